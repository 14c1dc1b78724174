"""Which addresses the guard allows, and that no connection gets around it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from batchvl.config.options import FetchOptions
from batchvl.errors import ConnectionFailed, ForbiddenAddress, OptionError
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.http1.connections import Connections
from batchvl.fetching.network import AddressRefused, NetworkGuard
from batchvl.fetching.resolver import Resolver
from batchvl.fetching.urls import parse_url, resolve_redirect
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.faults.server import JUNK, FaultServer
from tests.timing import scaled

FORBIDDEN_IPV4 = [
    "0.0.0.0",
    "0.1.2.3",
    "10.1.2.3",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.9.9.9",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "168.63.129.16",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
]
FORBIDDEN_IPV6 = [
    "::",
    "::1",
    "::127.0.0.1",
    "::8.8.8.8",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:db8::1",
    "2002:7f00:1::",
    "2002:0808:0808::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%eth0",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]
IRREGULAR = [*["2130706433", "0x7f000001", "0x7f.1", "017700000001", "127.1", "127.000.000.001", "localhost"], ""]
ALLOWED = ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"]


@pytest.mark.parametrize("address", [*FORBIDDEN_IPV4, *FORBIDDEN_IPV6, *IRREGULAR])
def test_forbidden(address: str) -> None:
    guard = NetworkGuard()
    assert not guard.allows(address)
    with pytest.raises(AddressRefused):
        guard.open_socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80)), address)


@pytest.mark.parametrize("address", ALLOWED)
def test_allowed(address: str) -> None:
    assert NetworkGuard().allows(address)


@pytest.mark.parametrize(
    ("network", "address", "allowed"),
    [
        ("127.0.0.0/8", "127.0.0.1", True),
        ("127.0.0.0/8", "::ffff:127.0.0.1", True),
        ("127.0.0.0/8", "64:ff9b::127.0.0.1", True),
        ("127.0.0.0/8", "::1", False),
        ("127.0.0.0/8", "127.1", False),
        ("::1", "::1", True),
        ("10.0.0.7", "10.0.0.7", True),
        ("10.0.0.7", "10.0.0.8", False),
        ("fe80::/10", "fe80::1%eth0", True),
        ("2002::/16", "2002:7f00:1::", True),
    ],
)
def test_private_networks_can_be_allowed(network: str, address: str, allowed: bool) -> None:
    assert NetworkGuard([network]).allows(address) is allowed


@pytest.mark.parametrize("text", ["", "private", "10.0.0.1/8", "10.0.0.0/33", "10.0.0.0-10.0.0.9", "localhost"])
def test_an_invalid_network_is_an_error(text: str) -> None:
    with pytest.raises(OptionError, match=r"--allow-private.*expected a network"):
        NetworkGuard(["127.0.0.0/8", text])


@pytest.mark.parametrize(
    ("pattern", "host", "vouched"),
    [
        ("minio.internal", "minio.internal", True),
        ("minio.internal", "MINIO.internal.", True),
        (" Minio.Internal. ", "minio.internal", True),
        ("minio.internal", "a.minio.internal", False),
        ("minio.internal", "minio.internal.example.org", False),
        ("minio.internal", "xminio.internal", False),
        ("minio.internal", "minio-internal", False),
        ("minio.internal", "internal", False),
        ("*.internal", "a.internal", True),
        ("*.internal", "a.b.internal", True),
        ("*.internal", "internal", False),
        ("*.internal", "ainternal", False),
        ("*.internal", "127.0.0.1\0.internal", False),  # getaddrinfo takes it for 127.0.0.1
        ("*.internal", "127.0.0.1 .internal", False),
        ("*.internal", "127.0.0.1%.internal", False),
        ("*.internal", ".internal", False),
        ("*.internal", "a..internal", False),
        ("my_minio", "my_minio", True),
        ("localhost", "localhost", True),
        ("münchen.internal", "xn--mnchen-3ya.internal", True),
        ("*.münchen.internal", "a.xn--mnchen-3ya.internal", True),
        ("minio.internal", "127.0.0.1", False),
        ("minio.internal", "", False),
    ],
)
def test_names_can_be_vouched_for(pattern: str, host: str, vouched: bool) -> None:
    guard = NetworkGuard(allow_host=["other.internal", pattern])
    assert guard.allows("127.0.0.1", host) is vouched
    assert guard.allows("::ffff:10.0.0.1", host) is vouched
    assert not guard.allows("127.0.0.1")
    assert not guard.allows("127.1", host)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "*.",
        "*minio.internal",
        "a.*.internal",
        "*.*.internal",
        "minio.internal:9000",
        "http://minio.internal",
        "minio.internal/x",
        "me@minio.internal",
        "a b",
        "a..b",
        "10.0.0.1",
        "*.0.0.1",
        "127.1",
        "0x7f.0x1",
        "2130706433",
        "::1",
        "[::1]",
        "x" * 5000,
    ],
)
def test_an_invalid_name_is_an_error(text: str) -> None:
    with pytest.raises(OptionError, match=r"--allow-host: found .* expected a name such as") as raised:
        NetworkGuard(allow_host=["minio.internal", text])
    assert len(str(raised.value)) <= 300


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (AddressRefused("10.0.0.1", "10.0.0.1"), "10.0.0.1 is not a public address"),
        (AddressRefused("10.0.0.1", ""), "10.0.0.1 is not a public address"),
        (AddressRefused("10.0.0.1", "a.test"), "a.test resolves to 10.0.0.1, which is not a public address"),
    ],
)
def test_a_refusal_says_what_was_refused(refused: AddressRefused, message: str) -> None:
    assert str(refused) == message
    assert (refused.address, refused.errno) == ("10.0.0.1", None)
    assert refused.host in message


class FakeDNS:
    """Replaces `socket.getaddrinfo`, which all lookups end at. Each name has a list of answers, which take turns."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.answers, self.lookups = answers, 0
        self._system = socket.getaddrinfo

    def __call__(self, host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        name = (host.decode() if isinstance(host, bytes) else host).removesuffix(".test")
        if name not in self.answers:
            return self._system(host, port, *args, **kwargs)
        self.lookups += 1
        answers = self.answers[name]
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in (answers.pop(0) if len(answers) > 1 else answers[0])
        ]


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = JUNK
        yield server


async def fetch(url: str, allow_private: str = "127.0.0.0/8") -> int:
    """Fetch an image and return its length."""
    arena = Arena(64)
    try:
        options = FetchOptions(allow_private=(allow_private,), fetch_retries=0)
        async with Fetcher(options, arena) as fetcher, asyncio.timeout(scaled(5)):
            fetched = await fetcher.fetch([WebImage(url)])
            [extent] = fetched.extents
            assert extent is not None
            fetched.release()
            return extent.length
    finally:
        assert arena.free_blocks == 64
        arena.close()


async def test_only_the_allowed_addresses_of_a_host_are_tried(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(mixed=[["10.0.0.1", "::1", "127.0.0.1", "192.168.0.1"]]))
    assert await fetch(server.url("/image/cat", "mixed.test")) == len(JUNK)


async def test_an_allowed_address_that_fails_is_not_reported_as_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(mixed=[["127.0.0.1", "10.0.0.1"]]))
    with pytest.raises(ConnectionFailed):
        await fetch("http://mixed.test:9/")


async def test_a_host_without_an_allowed_address_is_forbidden(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(inside=[["127.0.0.1", "10.0.0.1"]]))
    with pytest.raises(ForbiddenAddress, match=r"127\.0\.0\.1.*--allow-private"):
        await fetch(server.url("/image/cat", "inside.test"), allow_private="10.9.0.0/16")
    assert server.requests.total() == 0


async def test_a_name_that_changes_its_address_is_checked_when_connecting(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DNS rebinding: whatever the first lookup returned, the guard checks the address that the socket connects to.
    dns = FakeDNS(rebound=[["8.8.8.8"], ["127.0.0.1"]])
    monkeypatch.setattr(socket, "getaddrinfo", dns)
    socket.getaddrinfo("rebound.test", server.port)
    with pytest.raises(ForbiddenAddress):
        await fetch(server.url("/image/cat", "rebound.test"), allow_private="10.9.0.0/16")
    assert (dns.lookups, server.requests.total()) == (2, 0)


async def test_a_redirect_to_a_private_name_is_forbidden(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(inside=[["10.0.0.1"]]))
    with pytest.raises(ForbiddenAddress):
        await fetch(server.url("/redirect?to=http://inside.test/"))


async def test_the_sockets_are_guarded_even_without_the_resolver(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NetworkGuard, "resolver", lambda self, resolver: resolver)
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(inside=[["127.0.0.1"]]))
    with pytest.raises(ForbiddenAddress):
        await fetch(server.url("/image/cat", "inside.test"), allow_private="10.9.0.0/16")
    assert server.requests.total() == 0


class Client:
    """A client whose guard vouches for vouched.test. All names of these tests lead to the server."""

    def __init__(self, server: FaultServer) -> None:
        self._server = server

    async def __aenter__(self) -> Client:
        guard = NetworkGuard(allow_host=["vouched.test"])
        self._connections = Connections(guard, Resolver(), connect_timeout=scaled(5), keep_alive=9, max_idle=9)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._connections.close()

    async def get(self, host: str, path: str = "/image/cat") -> int | AddressRefused:
        """Return the status of the last response, redirects followed, or the refusal."""
        target = parse_url(self._server.url(path, host))
        try:
            async with asyncio.timeout(scaled(5)):
                while True:
                    with await self._connections.request(target, ()) as response:
                        if response.status != 302:
                            return response.status
                        target = resolve_redirect(target, response.headers["Location"])
        except AddressRefused as refused:
            return refused


@pytest_asyncio.fixture
async def client(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    dns = FakeDNS(vouched=[["127.0.0.1"]], other=[["127.0.0.1"]])
    monkeypatch.setattr(socket, "getaddrinfo", dns)
    async with Client(server) as client:
        yield client


async def test_a_name_that_is_vouched_for_may_be_private(client: Client) -> None:
    assert await client.get("vouched.test") == 200
    assert await client.get("VOUCHED.test") == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "other.test", "[::ffff:7f00:1]", "localhost", "sub.vouched.test@0x7f.1"])
async def test_the_address_of_such_a_name_stays_refused(client: Client, server: FaultServer, host: str) -> None:
    hosts = ["vouched.test", host] * 10  # the same task or not, before, meanwhile and after
    results = [await client.get(host) for host in hosts]
    results += await asyncio.gather(*map(client.get, hosts))
    assert results[::2] == [200] * 20
    for result in results[1::2]:
        assert isinstance(result, AddressRefused)
        assert result.host == host.rpartition("@")[2].strip("[]")
    assert server.requests.total() == 20


@pytest.mark.parametrize("host", ["127.0.0.1", "other.test"])
async def test_a_redirect_does_not_inherit_the_trust_in_a_name(client: Client, server: FaultServer, host: str) -> None:
    refused = await client.get("vouched.test", f"/redirect?to={server.url('/image/cat', host)}")
    assert isinstance(refused, AddressRefused)
    assert (refused.address, refused.host) == ("127.0.0.1", host)
    assert server.requests.total() == 1
    assert await client.get("vouched.test", f"/redirect?to={server.url('/image/cat', 'vouched.test')}") == 200


async def test_all_addresses_of_such_a_name_are_tried(
    client: Client, server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(vouched=[["::1", "127.0.0.2", "127.0.0.1"]]))
    assert await client.get("vouched.test") == 200
