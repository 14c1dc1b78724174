"""Checks of URLs report what a fetch would report, without a lookup; and no spelling of an address gets past either."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
import pytest_asyncio

from batchvl.config.options import FetchOptions, RunOptions
from batchvl.errors import FetchError, ForbiddenAddress, InvalidUrl, NameResolutionFailed
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.network import NetworkGuard
from batchvl.fetching.url_checker import UrlChecker
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.timing import scaled

REFUSED = [
    "http://127.0.0.1/a.png",
    "https://127.0.0.1:8443/",
    "HTTP://127.0.0.1",
    "http://me:secret@127.0.0.1/",
    "http://[::1]/",
    "http://[::ffff:10.0.0.1]:80/",
    "http://[fe80::1%25eth0]/",
    "http://169.254.169.254/latest",
    "http://localhost/",
    "http://LOCALHOST:80/",
    "http://0x7f.1/",
    "http://127.1/",
    "http://2130706433/",
    "http://017700000001/",
    "http://127.0.0.1./",
    "http://127.0.0.1\t/",
    "http://10.1.2.3?a",
    "http://0.0.0.0/",
    "http://",
    "http:///a.png",
    "http://?",
    "http:/a/b",
    "http://example.org:99999/",
    "http://example.org:port/",
    "http://[::1/",
    "http://a..b/",
    "http://127.0.0.1\0.example.org/",
    "http://\u2100.org/",
    "http://a\\b/",
    "http://example.org\\@127.0.0.1/",
    f"http://{'a' * 70}.org/",
]
GOOD = [
    "https://example.org/a.png",
    "http://EXAMPLE.org",
    "http://example.org:8080?x#y",
    "http://8.8.8.8/",
    "https://[2606:4700:4700::1111]/a",
    "http://münchen.example/",
    "http://xn--mnchen-3ya.example/",
    "http://a_b.example/",
    "http://me:secret@example.org/",
    "http://single/",
    "http://a.b.c.d.e.f.example/",
    "http://example.org/ a?b c",
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if it looks up a name or connects."""
    look_up = socket.getaddrinfo

    def numeric(*arguments: Any, **named: Any) -> Any:
        assert named["flags"] == socket.AI_NUMERICHOST
        return look_up(*arguments, **named)

    def connect(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket, "getaddrinfo", numeric)
    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.mark.parametrize("url", REFUSED)
async def test_the_error_is_that_of_a_fetch(url: str) -> None:
    options = RunOptions.of(fetch_retries=0, fetch_timeout=5).fetch
    async with Fetcher(options, Arena(1000)) as fetcher:
        with pytest.raises(FetchError) as checked:
            UrlChecker(NetworkGuard()).check(WebImage(url))
        with pytest.raises(FetchError) as fetched:
            await fetcher.fetch([WebImage(url)])
    assert (type(checked.value), str(checked.value)) == (type(fetched.value), str(fetched.value))
    assert "secret" not in str(checked.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("url", GOOD)
def test_urls_that_only_a_fetch_can_judge_pass(url: str) -> None:
    checker = UrlChecker(NetworkGuard())
    checker.check(WebImage(url))


@pytest.mark.usefixtures("no_network")
def test_allowed_private_networks_pass() -> None:
    checker = UrlChecker(NetworkGuard(["127.0.0.0/8"]))
    for url in ("http://127.0.0.1/", "http://localhost:8000/", "http://0x7f.1/"):
        checker.check(WebImage(url))
    for url in ("http://10.0.0.1/a", "http://10.0.0.1/b"):
        with pytest.raises(ForbiddenAddress, match=url):
            checker.check(WebImage(url))


def test_many_different_hosts_are_checked_quickly() -> None:
    checker = UrlChecker(NetworkGuard())
    started = time.process_time()
    for number in range(10_000):
        checker.check(WebImage(f"https://img{number}.example.org/a.png"))
    assert time.process_time() - started < 1  # 0.1 s


# Spellings of addresses that are not public. PORT is that of a server at 127.0.0.1 and ::1.
SPELLINGS = [
    # IPv4 as it should be, and the forms that inet_aton(3) reads
    "http://127.0.0.1:PORT/",
    "http://127.0.0.2:PORT/",
    "http://127.255.255.254:PORT/",
    "http://0.0.0.0:PORT/",
    "http://0:PORT/",
    "http://00000000000:PORT/",
    "http://127.1:PORT/",
    "http://127.0.1:PORT/",
    "http://2130706433:PORT/",
    "http://4294967295:PORT/",
    "http://4294967297:PORT/",
    "http://017700000001:PORT/",
    "http://0177.0.0.1:PORT/",
    "http://0177.0000.0000.0001:PORT/",
    "http://127.000.000.001:PORT/",
    "http://0x7f000001:PORT/",
    "http://0X7F000001:PORT/",
    "http://0x7f.0x0.0x0.0x1:PORT/",
    "http://0x7f.1:PORT/",
    "http://0x7f.0.0.1:PORT/",
    "http://0177.0x0.1:PORT/",
    "http://0x00000000007f.1:PORT/",
    "http://383.0.0.1:PORT/",
    "http://127.0.0.257:PORT/",
    # trailing dots and odd characters
    "http://127.0.0.1.:PORT/",
    "http://127.0.0.1..:PORT/",
    "http://0x7f.1.:PORT/",
    "http://127.0.0.1 :PORT/",
    "http://127.0.0.1%20:PORT/",
    "http://127.0.0.1\t:PORT/",
    "http://127.0.0.1%00.example.org:PORT/",
    "http://127.0.0.1\0.example.org:PORT/",
    " http://127.0.0.1:PORT/",
    "HTTP://127.0.0.1:PORT",
    "http:\\\\127.0.0.1:PORT/",
    "http:/\\127.0.0.1:PORT/",
    "http:127.0.0.1:PORT/",
    # percent-encoding
    "http://%31%32%37.0.0.1:PORT/",
    "http://127%2e0%2e0%2e1:PORT/",
    "http://%6c%6f%63%61%6c%68%6f%73%74:PORT/",
    "http://[%3a%3a1]:PORT/",
    # digits and dots that IDNA maps to ASCII (UTS 46)
    "http://127\u30020\u30020\u30021:PORT/",
    "http://127\uff0e0\uff0e0\uff0e1:PORT/",
    "http://127\uff610\uff610\uff611:PORT/",
    "http://\uff11\uff12\uff17.\uff10.\uff10.\uff11:PORT/",
    "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460:PORT/",
    "http://\u2460\u2461\u2466.\u2460:PORT/",
    "http://\u00b9\u00b2\u2077.0.0.\u00b9:PORT/",
    "http://\U0001d7cf\U0001d7d0\U0001d7d5.0.0.1:PORT/",
    "http://0\uff587f.1:PORT/",
    "http://127\u20240\u20240\u20241:PORT/",
    "http://12\u00ad7.0.0.1:PORT/",
    "http://12\u200b7.0.0.1:PORT/",
    "http://\u24db\u24de\u24d2\u24d0\u24db\u24d7\u24de\u24e2\u24e3:PORT/",
    "http://\uff4c\uff4f\uff43\uff41\uff4c\uff48\uff4f\uff53\uff54:PORT/",
    # users, and other parts of a URL that look like a host
    "http://example.org@127.0.0.1:PORT/",
    "http://example.org:80@127.0.0.1:PORT/",
    "http://me:secret@127.0.0.1:PORT/",
    "http://@127.0.0.1:PORT/",
    "http://a@b@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT#@example.org/",
    "http://127.0.0.1:PORT?@example.org/",
    "http://127.0.0.1:PORT\\@example.org/",
    "http://example.org\\@127.0.0.1:PORT/",
    "http://example.org%40127.0.0.1:PORT/",
    "http://127.0.0.1:PORT:80/",
    "http://127.0.0.1:0PORT/",
    # IPv6, and addresses that contain an IPv4 address
    "http://[::1]:PORT/",
    "http://[::]:PORT/",
    "http://[0:0:0:0:0:0:0:1]:PORT/",
    "http://[0000:0000:0000:0000:0000:0000:0000:0001]:PORT/",
    "http://[::0001]:PORT/",
    "http://[::1%25lo]:PORT/",
    "http://[::1%lo]:PORT/",
    "http://[::1%251]:PORT/",
    "http://[fe80::1%25lo]:PORT/",
    "http://[::ffff:127.0.0.1]:PORT/",
    "http://[::FFFF:7F00:1]:PORT/",
    "http://[0:0:0:0:0:ffff:127.0.0.1]:PORT/",
    "http://[::ffff:0.0.0.0]:PORT/",
    "http://[::127.0.0.1]:PORT/",
    "http://[::ffff:0:127.0.0.1]:PORT/",
    "http://[64:ff9b::127.0.0.1]:PORT/",
    "http://[64:ff9b::7f00:1]:PORT/",
    "http://[64:ff9b:1::127.0.0.1]:PORT/",
    "http://[2002:7f00:1::]:PORT/",
    "http://[2001:0:7f00:1::80ff:fffe]:PORT/",
    "http://[127.0.0.1]:PORT/",
    "http://[v1.127.0.0.1]:PORT/",
    "http://::1:PORT/",
    "http://[::1:PORT/",
    "http://\uff3b::1\uff3d:PORT/",
    # localhost
    "http://localhost:PORT/",
    "http://LocalHost:PORT/",
    # private networks and metadata services
    "http://10.0.0.1/",
    "http://172.31.255.255/",
    "http://192.168.0.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://2852039166/latest/meta-data/",
    "http://0xa9fea9fe/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::a9fe:a9fe]/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://168.63.129.16/",
]
NAMES = {
    "localhost.": ["127.0.0.1"],
    "localhost.localdomain": ["127.0.0.1"],
    "sub.localhost": ["127.0.0.1"],
    "ip6-localhost": ["::1"],
    "127.0.0.1.dns.test": ["127.0.0.1"],
    "7f000001.dns.test": ["127.0.0.1"],
    "127-0-0-1.dns.test": ["127.0.0.1"],
    "zero.test": ["0.0.0.0"],
    "six.test": ["::1"],
    "any.test": ["::"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "compatible.test": ["::127.0.0.1"],
    "nat64.test": ["64:ff9b::7f00:1"],
    "6to4.test": ["2002:7f00:1::"],
    "scoped.test": ["fe80::1%lo"],
    "several.test": ["10.0.0.1", "::1", "127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "1.0.0.127.in-addr.arpa": ["127.0.0.1"],
    "xn--mnchen-3ya.test": ["127.0.0.1"],
}
"""Names that lead there, and what DNS says about them. All others do not exist."""


class Loopback:
    """A server that counts connections."""

    def __init__(self) -> None:
        self.connections = 0

    async def __aenter__(self) -> Loopback:
        self._servers = [await asyncio.start_server(self._count, "127.0.0.1", 0)]
        self.port: int = self._servers[0].sockets[0].getsockname()[1]
        with suppress(OSError):  # no IPv6
            self._servers.append(await asyncio.start_server(self._count, "::1", self.port))
        return self

    async def __aexit__(self, *exc: object) -> None:
        for server in self._servers:
            server.close()

    def _count(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        writer.close()


@pytest_asyncio.fixture
async def loopback(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Loopback]:
    look_up = socket.getaddrinfo

    def from_table(host: str, port: Any, **options: Any) -> Any:
        numeric = NAMES.get(host, ["127.0.0.1"] if host == "localhost" else [host])
        options["flags"] = socket.AI_NUMERICHOST
        return [info for address in numeric for info in look_up(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", from_table)
    async with Loopback() as server:
        yield server


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the addresses that sockets are connected to, which is filled in the test."""
    addresses: list[Any] = []
    connect = socket.socket.connect

    def record(self: socket.socket, address: Any) -> None:
        addresses.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", record)
    return addresses


async def fetch(url: str, *allow_private: str) -> None:
    options = FetchOptions(allow_private=allow_private, fetch_retries=0)
    async with Fetcher(options, Arena(64)) as fetcher, asyncio.timeout(scaled(10)):
        (await fetcher.fetch([WebImage(url)])).release()


def test_there_are_enough_spellings() -> None:
    assert len(set(SPELLINGS)) == len(SPELLINGS) >= 60


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_no_spelling_of_an_address_is_connected_to(
    loopback: Loopback, connected: list[Any], spelling: str
) -> None:
    url = spelling.replace("PORT", str(loopback.port))
    with pytest.raises((ForbiddenAddress, InvalidUrl, NameResolutionFailed)):
        await fetch(url)
    checker = UrlChecker(NetworkGuard())
    with suppress(ForbiddenAddress, InvalidUrl):  # or it is for DNS to say
        checker.check(WebImage(url))
    assert (loopback.connections, connected) == (0, [])


@pytest.mark.parametrize("name", NAMES)
async def test_no_name_for_such_an_address_is_connected_to(loopback: Loopback, connected: list[Any], name: str) -> None:
    url = f"http://{name}:{loopback.port}/"
    with pytest.raises(ForbiddenAddress):
        await fetch(url)
    checker = UrlChecker(NetworkGuard())
    checker.check(WebImage(url))
    assert (loopback.connections, connected) == (0, [])


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "0x7f.1", "\u2460\u2461\u2466.\u24ea.\u24ea.\u2460", "localhost", "mapped.test"]
)
async def test_the_server_could_be_reached(loopback: Loopback, connected: list[Any], host: str) -> None:
    with pytest.raises(FetchError):
        await fetch(f"http://{host}:{loopback.port}/", "127.0.0.0/8")
    assert loopback.connections
    assert connected
