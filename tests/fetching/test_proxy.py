"""Images through a proxy: what it gets, what it is never asked for, and what happens when it cannot be used."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import pytest
import pytest_asyncio

from batchvl.config.options import RunOptions
from batchvl.errors import (
    ConnectionFailed,
    ForbiddenAddress,
    HttpRetryable,
    HttpStatus,
    InvalidUrl,
    NameResolutionFailed,
    OptionError,
    RowError,
    StoppedEarly,
)
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.network import NetworkGuard
from batchvl.fetching.url_checker import UrlChecker
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.faults.proxy import ForwardProxy
from tests.faults.server import JUNK, FaultServer
from tests.fetching.objects import fetch_one
from tests.fetching.test_url_checker import NAMES, SPELLINGS
from tests.timing import scaled

USER = "me:s3cr3t"
DNS = {"localhost": ["127.0.0.1"], "found.example": ["8.8.8.8"], "mixed.example": ["8.8.8.8", "10.0.0.1"]} | NAMES
"""What this machine knows about names."""


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = JUNK
        yield server


@pytest_asyncio.fixture
async def proxy(server: FaultServer) -> AsyncIterator[ForwardProxy]:
    names = ("images.example", "found.example", "minio", "metadata.google.internal")
    async with ForwardProxy({f"{name}:80": ("127.0.0.1", server.port) for name in names}, USER) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def dns(monkeypatch: pytest.MonkeyPatch) -> None:
    look_up = socket.getaddrinfo

    def from_table(host: str, port: Any, **options: Any) -> Any:
        if host not in DNS and not host.replace(".", "").isdigit():
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        options["flags"] = socket.AI_NUMERICHOST
        return [info for address in DNS.get(host, [host]) for info in look_up(address, port, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", from_table)


@asynccontextmanager
async def fetching(through: ForwardProxy, user: str = USER, **options: Any) -> AsyncIterator[Callable[[str], Any]]:
    """Yield a function that fetches one URL through the proxy. The guard allows public addresses alone."""
    defaults = {"proxy": through.url(user), "fetch_timeout": scaled(5), "fetch_retries": 0}
    arena = Arena(512)

    async def fetch(url: str) -> bytes:
        return await fetch_one(fetcher, arena, url)

    async with Fetcher(RunOptions.of(**(defaults | options)).fetch, arena, backoff=0.01) as fetcher:
        yield fetch
    arena.close()


async def test_a_request_through_a_proxy(proxy: ForwardProxy, server: FaultServer) -> None:
    """Its name is one that only the proxy knows."""
    async with fetching(proxy) as fetch:
        assert await fetch("http://images.example/image/cat?a=%2f") == JUNK
    [request] = proxy.requests
    assert (request.method, request.target) == ("GET", "http://images.example/image/cat?a=%2f")
    assert server.headers["/image/cat?a=%2f"]["Host"] == "images.example"
    assert "Proxy-Authorization" not in server.headers["/image/cat?a=%2f"]
    assert proxy.checks == 1


async def test_a_redirect_goes_through_the_proxy_too(proxy: ForwardProxy) -> None:
    async with fetching(proxy) as fetch:
        assert await fetch("http://images.example/redirect?to=http://found.example/image/cat") == JUNK
    assert [request.target.rpartition("/")[0] for request in proxy.requests] == [
        "http://images.example/redirect?to=http://found.example/image",
        "http://found.example/image",
    ]


async def test_no_spelling_of_an_address_is_asked_of_the_proxy(proxy: ForwardProxy) -> None:
    refusals = (ForbiddenAddress, InvalidUrl, NameResolutionFailed)
    ways = [
        *(spelling.replace("PORT", "8000") for spelling in SPELLINGS),
        *(spelling.replace("PORT", "8443").replace("http:", "https:") for spelling in SPELLINGS),
        *(f"http://{name}/" for name in NAMES),
    ]
    async with fetching(proxy, fetch_per_host=64) as fetch:
        for way in ways:
            with pytest.raises(refusals):
                await fetch(way)
        for way in ("http://127.0.0.1/", "https://[::1]/"):
            with pytest.raises(ForbiddenAddress):
                await fetch(f"http://images.example/redirect?to={way}")
    assert {request.target.partition("?")[0] for request in proxy.requests} == {"http://images.example/redirect"}


@pytest.mark.parametrize(
    ("host", "error"),
    [
        ("mixed.example", ForbiddenAddress),  # nobody knows which one the proxy would take
        ("metadata.google.internal", NameResolutionFailed),
        ("minio", NameResolutionFailed),
        ("printer.local", NameResolutionFailed),
        ("8.8.8.0x8", InvalidUrl),  # an address, and for other parsers a name
        ("127.0.0.1%252f.images.example", InvalidUrl),
        ("a!b.images.example", InvalidUrl),
    ],
)
async def test_hosts_that_the_proxy_is_not_asked_for(proxy: ForwardProxy, host: str, error: type[RowError]) -> None:
    async with fetching(proxy) as fetch:
        with pytest.raises(error):
            await fetch(f"http://{host}/image/cat")
    assert not proxy.requests
    checker = UrlChecker(NetworkGuard(), through_proxy=True)
    with pytest.raises(error) if error is InvalidUrl else nullcontext():
        checker.check(WebImage(f"http://{host}/image/cat"))


@pytest.mark.parametrize("host", ["minio", "metadata.google.internal"])
async def test_a_host_that_the_operator_vouches_for(proxy: ForwardProxy, host: str) -> None:
    async with fetching(proxy, allow_host=[host]) as fetch:
        assert await fetch(f"http://{host}/image/cat") == JUNK


async def test_names_are_left_to_the_proxy_if_no_name_server_answers(
    proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = asyncio.Event()
    loop, look_up = asyncio.get_running_loop(), socket.getaddrinfo

    def hang(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(("example", "internal")):
            asyncio.run_coroutine_threadsafe(answered.wait(), loop).result()
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    try:
        async with fetching(proxy, fetch_timeout=scaled(9)) as fetch:
            assert await fetch("http://images.example/image/cat") == JUNK
            with pytest.raises(NameResolutionFailed, match="no answer"):
                await fetch("http://metadata.google.internal/image/cat")
    finally:
        answered.set()


async def test_a_proxy_that_is_not_there_ends_the_fetch_at_once(proxy: ForwardProxy) -> None:
    await proxy.stop()
    async with fetching(proxy) as fetch:
        with pytest.raises(OptionError, match=r"--proxy: the proxy http://127\.0\.0\.1:\d+ is not reached: .*refused"):
            await fetch("http://images.example/image/cat")


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "401 Unauthorized"])
@pytest.mark.parametrize(("user", "text"), [("", "asks for a user and a password"), ("me:wr0ng", "does not accept")])
async def test_a_wrong_password_ends_the_fetch_at_once(proxy: ForwardProxy, user: str, text: str, status: str) -> None:
    proxy.unauthorized = status
    async with fetching(proxy, user) as fetch:
        with pytest.raises(OptionError, match=text) as caught:
            await fetch("http://images.example/image/cat")
    assert "wr0ng" not in str(caught.value)
    assert not proxy.requests


async def test_something_other_than_a_proxy_ends_the_fetch_at_once(proxy: ForwardProxy) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.6\r\n")
        writer.close()

    other = await asyncio.start_server(greet, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{other.sockets[0].getsockname()[1]}"
    async with other, fetching(proxy, proxy=url) as fetch:
        with pytest.raises(OptionError, match="does not answer as an HTTP proxy does"):
            await fetch("http://images.example/image/cat")


@pytest.mark.parametrize(
    ("status", "is_final"), [("403 Forbidden", True), ("407 Ask", True), ("401 Ask", True), ("502 Bad Gateway", False)]
)
async def test_a_host_that_the_proxy_does_not_connect_to(proxy: ForwardProxy, status: str, is_final: bool) -> None:
    """A refusal is final, and a failure is the host's, which is tried again. Other hosts are not affected."""
    proxy.refuses["images.example:443"] = status
    async with fetching(proxy, fetch_retries=1, host_patience=0) as fetch, asyncio.timeout(scaled(30)):
        with pytest.raises(ConnectionFailed, match=f"the proxy answered with HTTP status {status[:3]}"):
            await fetch("https://images.example/image/cat")
        assert (len(proxy.requests) == 1) is is_final
        assert await fetch("http://images.example/image/cat") == JUNK


async def test_a_host_without_a_name_server_of_the_proxy(proxy: ForwardProxy) -> None:
    async with fetching(proxy) as fetch:
        with pytest.raises(HttpRetryable, match="502"):
            await fetch("http://nowhere.example/")


async def test_a_host_cannot_pretend_that_the_proxy_wants_a_password(proxy: ForwardProxy) -> None:
    async with fetching(proxy) as fetch:
        with pytest.raises(HttpStatus, match="407"):
            await fetch("http://images.example/status/407")
        assert proxy.checks == 2
        assert await fetch("http://images.example/image/cat") == JUNK


async def test_images_wait_for_a_proxy_that_is_gone(proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt is used up, no host is blamed, and nobody hammers at the door."""
    attempts: list[Any] = []
    connect = socket.socket.connect

    def record(self: socket.socket, address: Any) -> None:
        attempts.append(address)
        connect(self, address)

    async with fetching(proxy, host_patience=scaled(60)) as fetch, asyncio.timeout(scaled(30)):
        assert await fetch("http://images.example/image/cat") == JUNK
        await proxy.stop()
        monkeypatch.setattr(socket.socket, "connect", record)
        hosts = ["images.example", "found.example"] * 10
        fetches = [asyncio.create_task(fetch(f"http://{host}/image/cat?{n}")) for n, host in enumerate(hosts)]
        _, pending = await asyncio.wait(fetches, timeout=0.2)
        assert len(pending) == len(fetches)
        assert 0 < len(attempts) < 20
        await proxy.start()
        assert await asyncio.gather(*fetches) == [JUNK] * 20


async def test_a_password_that_is_not_accepted_any_more(proxy: ForwardProxy) -> None:
    async with fetching(proxy, host_patience=0) as fetch:
        assert await fetch("http://images.example/image/cat") == JUNK
        proxy.user = "me:another"
        for url in ("http://images.example/image/cat?1", "https://images.example/image/cat?1"):
            with pytest.raises(
                StoppedEarly, match=r"does not accept its user and password .*again to resume"
            ) as caught:
                await fetch(url)
            assert "s3cr3t" not in str(caught.value)
        proxy.user = USER
        assert await fetch("http://images.example/image/cat?2") == JUNK
