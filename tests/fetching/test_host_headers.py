"""Headers for certain hosts: who gets them, who does not, and what a file may not have."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from batchvl.config.options import RunOptions
from batchvl.errors import FetchError, OptionError
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.host_headers import HostHeaders
from batchvl.fetching.urls import parse_url
from batchvl.ipc.arena import Arena
from batchvl.types import WebImage
from tests.faults.server import JUNK, FaultServer
from tests.timing import scaled

TOKEN = "Bearer s3cr3t"


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = JUNK
        yield server


def write(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@asynccontextmanager
async def fetching(file: Path, **options: Any) -> AsyncIterator[Fetcher]:
    defaults = {"allow_private": ["127.0.0.0/8"], "fetch_timeout": scaled(5), "fetch_retries": 0}
    arena = Arena(512)
    async with Fetcher(RunOptions.of(host_headers=file, **(defaults | options)).fetch, arena) as fetcher:
        yield fetcher
    arena.close()


async def get(fetcher: Fetcher, url: str) -> None:
    (await fetcher.fetch([WebImage(url)])).release()


async def test_a_host_gets_its_headers_and_others_do_not(server: FaultServer, tmp_path: Path) -> None:
    file = write(
        tmp_path / "headers.toml",
        f'["http://127.0.0.1:{server.port}"]\nauthorization = "{TOKEN}"\nX-API-Key = "k3y"\nAccept = "image/webp"\n',
    )
    async with fetching(file) as fetcher, FaultServer() as other:
        other.images = server.images
        await get(fetcher, server.url("/image/cat?1"))
        await get(fetcher, server.url("/image/cat?2", "localhost"))
        await get(fetcher, other.url("/image/cat?3"))
    headers = server.headers["/image/cat?1"]
    assert (headers["Authorization"], headers["X-Api-Key"], headers["Accept"]) == (TOKEN, "k3y", "image/webp")
    assert headers["User-Agent"].startswith("batchvl/")
    for headers in (server.headers["/image/cat?2"], other.headers["/image/cat?3"]):
        assert not {"Authorization", "X-Api-Key"} & headers.keys()
        assert headers["Accept"].startswith("image/*")


async def test_headers_are_dropped_on_a_redirect_to_another_host(server: FaultServer, tmp_path: Path) -> None:
    """A redirect back is a request to a host that gets them anyway."""
    file = write(tmp_path / "headers.toml", f'["http://127.0.0.1:{server.port}"]\nAuthorization = "{TOKEN}"\n')
    back = server.url("/image/cat?back")
    away = server.url(f"/redirect?to={back}", "localhost")
    async with fetching(file) as fetcher:
        await get(fetcher, server.url(f"/redirect?to={away.replace('?', '%3f')}"))
    [away_headers] = [headers for path, headers in server.headers.items() if headers["Host"].startswith("localhost")]
    assert "Authorization" not in away_headers
    first = next(iter(server.headers.values()))
    assert first["Authorization"] == server.headers["/image/cat?back"]["Authorization"] == TOKEN


async def test_user_and_password_of_a_url_have_precedence(server: FaultServer, tmp_path: Path) -> None:
    file = write(
        tmp_path / "headers.toml", f'["http://127.0.0.1:{server.port}"]\nAuthorization = "{TOKEN}"\nX-Key = "k"\n'
    )
    async with fetching(file) as fetcher:
        await get(fetcher, server.url("/image/cat").replace("://", "://me:pw@"))
    headers = server.headers["/image/cat"]
    assert headers["Authorization"].startswith("Basic ")
    assert headers["X-Key"] == "k"


async def test_cookies_of_a_redirect_are_added(server: FaultServer, tmp_path: Path) -> None:
    from aiohttp import web

    async def redirect(request: web.Request) -> web.StreamResponse:
        response = web.Response(status=302, headers={"Location": "/image/cat"})
        response.set_cookie("seen", "before")
        return response

    server._hop = redirect  # type: ignore[attr-defined]
    file = write(tmp_path / "headers.toml", f'["http://127.0.0.1:{server.port}"]\nCookie = "session=s3cr3t"\n')
    async with fetching(file) as fetcher:
        await get(fetcher, server.url("/hop"))
    assert server.headers["/image/cat"]["Cookie"] == "session=s3cr3t; seen=before"


async def test_values_are_in_no_error(server: FaultServer, tmp_path: Path) -> None:
    file = write(tmp_path / "headers.toml", f'["http://127.0.0.1:{server.port}"]\nAuthorization = "{TOKEN}"\n')
    async with fetching(file) as fetcher:
        for path in ("/status/401", "/garbage", "/reset"):
            with pytest.raises(FetchError) as caught:
                await get(fetcher, server.url(path))
            assert "s3cr3t" not in str(caught.value)


FILE = {
    "images.example": {"X-Key": "exact"},
    "*.images.example": {"X-Key": "below"},
    "*.eu.images.example": {"X-Key": "further below"},
    "images.example:8443": {"X-Key": "port"},
    "http://plain.example": {"X-Key": "http"},
    "HTTPS://Bücher.example/": {"X-Key": "idna"},
    "[::1]:8000": {"X-Key": "six"},
}


@pytest.mark.parametrize(
    ("url", "value"),
    [
        ("https://images.example/a", "exact"),
        ("https://IMAGES.example.:443/a", "exact"),
        ("https://images.example:8443/a", "port"),
        ("https://images.example:8444/a", None),
        ("http://images.example/a", None),
        ("https://a.images.example/a", "below"),
        ("https://a.b.images.example/a", "below"),
        ("https://a.eu.images.example/a", "further below"),
        ("https://eu.images.example/a", "below"),
        ("https://a.images.example:8443/a", None),
        ("https://notimages.example/a", None),
        ("https://images.example.org/a", None),
        ("https://images.example@evil.example/a", None),
        ("https://evil.example/https://images.example/", None),
        ("http://plain.example/a", "http"),
        ("https://plain.example/a", None),
        ("https://xn--bcher-kva.example/a", "idna"),
        ("https://[::1]:8000/a", "six"),
    ],
)
def test_which_requests_get_headers(url: str, value: str | None) -> None:
    assert HostHeaders(FILE).headers_for(parse_url(url)).get("X-Key") == value


def test_headers_that_are_not_sent_over_http_are_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    headers = HostHeaders(FILE)
    for url in ("http://images.example/a", "http://images.example/b", "http://nobody.example/"):
        assert not headers.headers_for(parse_url(url))
    [record] = caplog.records
    assert "not sent to images.example over http" in record.getMessage()
    assert "exact" not in record.getMessage()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('["images.example/cats"]\nA = "b"', "expected a host such as"),
        ('["https://me:s3cr3t@images.example"]\nA = "b"', "a host with a user or password"),
        ('["a*.example"]\nA = "b"', "expected a host such as"),
        ('["ftp://images.example"]\nA = "b"', "expected a host such as"),
        ('["images.example:port"]\nA = "b"', "expected a host such as"),
        ('[""]\nA = "b"', "expected a host such as"),
        ('["a.example"]\nA = "b"\n["A.EXAMPLE:443"]\nA = "b"', "twice, in different spellings"),
        ('[a.example]\nAuthorization = "s3cr3t"', "expected a host|in quotes"),
        ('["a.example"]\n[a.example]\nA = "b"', "in quotes"),
        ('Authorization = "s3cr3t"', "not in a table"),
        ('["a.example"]\nHost = "s3cr3t"', "Host is batchvl's own"),
        ('["a.example"]\nuser-agent = "s3cr3t"', "user-agent is batchvl's own; see --user-agent"),
        ('["a.example"]\nProxy-Authorization = "s3cr3t"', "belong to --proxy"),
        ('["a.example"]\nRange = "s3cr3t"', "batchvl's own"),
        ('["a.example"]\n"A B" = "s3cr3t"', "begins with 'A' is not valid"),
        ('["a.example"]\n"Authorization: Bearer s3cr3t" = ""', "begins with 'Authorization' is not valid"),
        ('["a.example"]\n"" = "s3cr3t"', "begins with '' is not valid"),
        ("", "is empty; expected a file, and no pipe"),
        ('["a.example"]\nA = "s3cr3t"\na = "s3cr3t"', "is there twice"),
        ('["a.example"]\nA = "s3cr3t\\r\\nHost: b"', "the value of A is not text"),
        ('["a.example"]\nA = "s3cr3t\\n"', "the value of A is not text"),
        ('["a.example"]\nA = "s3cr3t\\u0000"', "the value of A is not text"),
        ('["a.example"]\nA = "s3cr3tü"', "the value of A is not text"),
        ('["a.example"]\nA = ""', "the value of A is not text"),
        ('["a.example"]\nA = ["s3cr3t"]', "the value of A is not text"),
        ('["a.example"]\nA = s3cr3t', "not valid TOML"),
        ('["a.example"]\nA = "s3cr3t', "not valid TOML"),
    ],
)
def test_a_file_that_is_not_valid(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(OptionError, match=error) as caught:
        HostHeaders.read(write(tmp_path / "headers.toml", text))
    assert "--host-headers" in str(caught.value)
    assert "s3cr3t" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"^--host-headers: cannot read .*nothing\.toml: No such file"):
        HostHeaders.read(tmp_path / "nothing.toml")
    (tmp_path / "latin.toml").write_bytes(b'["a.example"]\nA = "\xe9"')
    with pytest.raises(OptionError, match="not UTF-8"):
        HostHeaders.read(tmp_path / "latin.toml")


@pytest.mark.parametrize(("mode", "is_exposed"), [(0o600, False), (0o400, False), (0o640, True), (0o644, True)])
def test_a_file_that_others_can_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, is_exposed: bool
) -> None:
    caplog.set_level(logging.WARNING)
    HostHeaders.read(write(tmp_path / "headers.toml", '["a.example"]\nA = "b"', mode))
    assert ("can be read by others" in caplog.text) is is_exposed
