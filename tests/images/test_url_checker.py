"""Checks of URLs report what a fetch would report, without a lookup."""

from __future__ import annotations

import socket
import time
from typing import Any

import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import FetchError, ForbiddenAddress
from batchvl.images.fetch import Fetcher
from batchvl.images.network import NetworkGuard
from batchvl.images.url_checker import UrlChecker
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage

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
    async with UrlChecker(NetworkGuard()) as checker, Fetcher(options, Arena(1000)) as fetcher:
        with pytest.raises(FetchError) as checked:
            await checker.check(WebImage(url))
        with pytest.raises(FetchError) as fetched:
            await fetcher.fetch([WebImage(url)])
    assert (type(checked.value), str(checked.value)) == (type(fetched.value), str(fetched.value))
    assert "secret" not in str(checked.value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("url", GOOD)
async def test_urls_that_only_a_fetch_can_judge_pass(url: str) -> None:
    async with UrlChecker(NetworkGuard()) as checker:
        await checker.check(WebImage(url))


@pytest.mark.usefixtures("no_network")
async def test_allowed_private_networks_pass() -> None:
    async with UrlChecker(NetworkGuard(["127.0.0.0/8"])) as checker:
        for url in ("http://127.0.0.1/", "http://localhost:8000/", "http://0x7f.1/"):
            await checker.check(WebImage(url))
        for url in ("http://10.0.0.1/a", "http://10.0.0.1/b"):
            with pytest.raises(ForbiddenAddress, match=url):
                await checker.check(WebImage(url))


async def test_many_different_hosts_are_checked_quickly() -> None:
    async with UrlChecker(NetworkGuard()) as checker:
        started = time.process_time()
        for number in range(10_000):
            await checker.check(WebImage(f"https://img{number}.example.org/a.png"))
    assert time.process_time() - started < 1  # 0.02 s if no URL is given to aiohttp
