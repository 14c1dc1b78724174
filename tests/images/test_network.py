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
from batchvl.images.fetch import Fetcher
from batchvl.images.network import AddressRefused, NetworkGuard
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
        guard.socket((socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 80)))


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
            [source] = fetched.sources
            assert source.extent is not None
            fetched.release()
            return source.extent.length
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
    from aiohttp import ThreadedResolver

    monkeypatch.setattr(NetworkGuard, "resolver", lambda self: ThreadedResolver())
    monkeypatch.setattr(socket, "getaddrinfo", FakeDNS(inside=[["127.0.0.1"]]))
    with pytest.raises(ForbiddenAddress):
        await fetch(server.url("/image/cat", "inside.test"), allow_private="10.9.0.0/16")
    assert server.requests.total() == 0
