"""The fetcher against a real, misbehaving web server."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.config.options import RunOptions
from batchvl.errors import (
    ConnectionFailed,
    EmptyImage,
    FetchError,
    FetchTimeout,
    ForbiddenAddress,
    HttpRetryable,
    HttpStatus,
    InvalidUrl,
    NameResolutionFailed,
    RowError,
    TooLarge,
    TooManyBytes,
    TooManyRedirects,
    UnsupportedSource,
)
from batchvl.images.fetch import Fetched, Fetcher, source_label
from batchvl.ipc.arena import Arena
from batchvl.types import FileImage, InlineImage, WebImage
from tests.faults.server import JUNK, FaultServer

BLOCK = 4096
LIMIT = 64 * 1024  # bytes of one picture in these tests: 16 blocks


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.pictures["cat"] = JUNK
        yield server


@asynccontextmanager
async def fetching(blocks: int = 512, backoff: float = 0.01, **options: Any) -> AsyncIterator[tuple[Fetcher, Arena]]:
    """A fetcher for loopback. Afterwards the arena is whole again, whatever happened."""
    flat: dict[str, Any] = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": LIMIT, "fetch_timeout": 5}
    arena = Arena(blocks, BLOCK)
    async with Fetcher(RunOptions.of(**(flat | options)).fetch, arena, backoff=backoff) as fetcher:
        yield fetcher, arena
    assert arena.free_blocks == blocks, "the fetcher kept a part of the arena"
    arena.close()


async def fails(*urls: str, **options: Any) -> RowError:
    async with fetching(**options) as (fetcher, _):
        with pytest.raises(RowError) as failed:
            await fetcher.fetch([WebImage(url) for url in urls])
        return failed.value


async def body(fetcher: Fetcher, arena: Arena, url: str) -> bytes:
    fetched = await fetcher.fetch([WebImage(url)])
    [data] = contents(fetched, arena)
    fetched.release()
    return data or b""


def contents(fetched: Fetched, arena: Arena) -> list[bytes | None]:
    return [bytes(arena.at(source.extent)) if source.extent else None for source in fetched.sources]


async def test_a_row_of_every_kind_of_picture(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        images = [
            WebImage(server.url("/picture/cat")),
            FileImage("sub/dog.png"),
            InlineImage(b"inline", "data:image/gif (6 bytes)"),
            WebImage(server.url("/picture/cat?length=no")),
        ]
        fetched = await fetcher.fetch(images)
        assert contents(fetched, arena) == [JUNK, None, b"inline", JUNK]
        assert fetched.sources[1].file == FileImage("sub/dog.png")
        assert [source.label for source in fetched.sources] == [
            server.url("/picture/cat"), "sub/dog.png", "data:image/gif (6 bytes)", server.url("/picture/cat?…")
        ]  # fmt: skip
        # 10,240 bytes are 3 blocks: nothing of the 16 that each was given at first is kept
        assert arena.free_blocks == 512 - 3 - 1 - 3
        fetched.release()


async def test_rows_without_pictures_or_with_files_alone_take_no_room() -> None:
    async with fetching(blocks=1) as (fetcher, arena):
        assert (await fetcher.fetch([])).sources == ()
        fetched = await fetcher.fetch([FileImage("a.png")])
        assert arena.free_blocks == 1
        fetched.release()


async def test_what_is_asked_for(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        await body(fetcher, arena, server.url("/cookie", "localhost"))  # a jar takes no cookies of addresses
        await body(fetcher, arena, server.url("/cookie", "localhost"))
        headers = server.headers["/cookie"]
        assert headers["User-Agent"].startswith("batchvl/")
        assert "Cookie" not in headers
        assert headers["Accept-Encoding"] == "identity"


async def test_the_environments_proxy_is_not_used(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url("/picture/cat")) == JUNK


async def test_user_and_password_of_a_url_are_sent_and_never_told(server: FaultServer) -> None:
    async with fetching() as (fetcher, _):
        url = server.url("/status/403?key=s3cret").replace("http://", "http://me:pa55@")
        with pytest.raises(HttpStatus, match="403") as failed:
            await fetcher.fetch([WebImage(url)])
        assert "Authorization" in server.headers["/status/403?key=s3cret"]
        assert not any(secret in str(failed.value) for secret in ("me:", "pa55", "s3cret"))


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451, 304])
async def test_a_lasting_status_is_not_tried_again(server: FaultServer, code: int) -> None:
    error = await fails(server.url(f"/status/{code}"))
    assert type(error) is HttpStatus
    assert str(code) in str(error)
    assert server.requests[f"/status/{code}"] == 1


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
async def test_a_passing_status_is_tried_again(server: FaultServer, code: int) -> None:
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url(f"/flaky/{code}/2")) == JUNK
    assert server.requests[f"/flaky/{code}/2"] == 3


async def test_retries_end(server: FaultServer) -> None:
    error = await fails(server.url("/status/503"), fetch_retries=2)
    assert type(error) is HttpRetryable
    assert error.retryable
    assert "503" in str(error)
    assert "tried 3 times" in str(error)
    assert server.requests["/status/503"] == 3


async def test_no_retries(server: FaultServer) -> None:
    assert type(await fails(server.url("/status/503"), fetch_retries=0)) is HttpRetryable
    assert server.requests["/status/503"] == 1


@pytest.mark.parametrize(("query", "least"), [("after=1", 1.0), ("after=0.0&date=1", 0.0), ("after=1&date=1", 1.0)])
async def test_retry_after_is_honoured(server: FaultServer, query: str, least: float) -> None:
    async with fetching() as (fetcher, arena):
        start = time.monotonic()
        assert await body(fetcher, arena, server.url(f"/flaky/429/1?{query}")) == JUNK
        assert least <= time.monotonic() - start < 2.5


@pytest.mark.parametrize("query", ["after=3600", "after=3600&date=1"])
async def test_a_retry_after_beyond_the_deadline_fails_at_once(server: FaultServer, query: str) -> None:
    start = time.monotonic()
    error = await fails(server.url(f"/flaky/429/1?{query}"))
    assert type(error) is HttpRetryable
    assert "3,60" in str(error) or "3,59" in str(error)
    assert time.monotonic() - start < 1


async def test_no_room_is_held_while_waiting_for_a_retry(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        fetch = asyncio.create_task(body(fetcher, arena, server.url("/flaky/503/1?after=1")))
        while not server.requests["/flaky/503/1?after=1"]:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert arena.free_blocks == 512
        assert await fetch == JUNK


async def test_inline_pictures_survive_a_retry(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        images = [
            InlineImage(b"before", "inline"),
            WebImage(server.url("/flaky/503/1")),
            InlineImage(b"after", "inline"),
        ]
        fetched = await fetcher.fetch(images)
        assert contents(fetched, arena) == [b"before", JUNK, b"after"]
        fetched.release()


@pytest.mark.parametrize("fault", ["reset", "short"])
async def test_a_body_that_breaks_off_is_fetched_again(server: FaultServer, fault: str) -> None:
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url(f"/{fault}/2")) == JUNK
    assert server.requests[f"/{fault}/2"] == 3


@pytest.mark.parametrize("fault", ["reset", "short", "cut", "garbage"])
async def test_a_body_that_always_breaks_off(server: FaultServer, fault: str) -> None:
    error = await fails(server.url(f"/{fault}"), fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert server.requests[f"/{fault}"] >= 2


async def test_nobody_listens() -> None:
    error = await fails("http://127.0.0.1:9/x", fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert "tried 2 times" in str(error)


async def test_a_server_without_tls(server: FaultServer) -> None:
    error = await fails(server.url("/picture/cat").replace("http:", "https:"), fetch_retries=0)
    assert type(error) is ConnectionFailed


async def test_no_such_host() -> None:
    error = await fails("http://no-such-host.invalid/x", fetch_retries=1)
    assert type(error) is NameResolutionFailed


@pytest.mark.parametrize("path", ["/silent/headers", "/silent/body"])
async def test_silence_is_noticed_in_time_for_another_attempt(server: FaultServer, path: str) -> None:
    error = await fails(server.url(path), fetch_timeout=0.5, fetch_retries=1)
    assert type(error) is FetchTimeout
    assert server.requests[path] == 2


async def test_the_deadline_covers_drips_and_all_attempts(server: FaultServer) -> None:
    start = time.monotonic()
    assert type(await fails(server.url("/drip"), fetch_timeout=0.4)) is FetchTimeout
    error = await fails(server.url("/silent/headers"), fetch_timeout=0.4, fetch_retries=100)
    assert type(error) is FetchTimeout
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize("length", ["", "&length=no"])
async def test_too_many_bytes(server: FaultServer, length: str) -> None:
    size = 200 * LIMIT
    error = await fails(server.url(f"/large?bytes={size}{length}"))
    assert type(error) is TooManyBytes
    assert server.sent < size / 2, "the client reads on although it is too much"
    assert server.requests.total() == 1


async def test_exactly_the_most_bytes(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url(f"/large?bytes={LIMIT}")) == bytes(LIMIT)
        assert await body(fetcher, arena, server.url(f"/large?bytes={LIMIT}&length=no")) == bytes(LIMIT)
        with pytest.raises(TooManyBytes):
            await fetcher.fetch([WebImage(server.url(f"/large?bytes={LIMIT + 1}&length=no"))])
        with pytest.raises(TooManyBytes):
            await fetcher.fetch([InlineImage(bytes(LIMIT + 1), "inline")])


async def test_the_limit_holds_after_content_encoding(server: FaultServer) -> None:
    assert type(await fails(server.url(f"/bomb?bytes={1000 * LIMIT}"))) is TooManyBytes
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url("/bomb?bytes=50000")) == bytes(50000)


async def test_empty_pictures(server: FaultServer) -> None:
    assert type(await fails(server.url("/empty"))) is EmptyImage
    async with fetching() as (fetcher, _):
        with pytest.raises(EmptyImage):
            await fetcher.fetch([InlineImage(b"", "inline")])


async def test_html_arrives_as_it_is_and_is_the_decoders_business(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        assert (await body(fetcher, arena, server.url("/html"))).startswith(b"<!DOCTYPE")


async def test_redirects_are_followed_but_not_for_ever(server: FaultServer) -> None:
    to = f"to={server.url('/picture/cat')}"
    async with fetching() as (fetcher, arena):
        assert await body(fetcher, arena, server.url(f"/redirect?hops=5&{to}")) == JUNK
    assert type(await fails(server.url(f"/redirect?hops=6&{to}"))) is TooManyRedirects
    assert type(await fails(server.url("/loop"))) is TooManyRedirects


@pytest.mark.parametrize(
    ("to", "error"),
    [
        ("file:///etc/passwd", UnsupportedSource),
        ("ftp://127.0.0.1/x", UnsupportedSource),
        ("http://10.0.0.1/x", ForbiddenAddress),
        ("http://169.254.169.254/latest/meta-data/", ForbiddenAddress),
        ("http://[::1]/x", ForbiddenAddress),
        ("http://", InvalidUrl),
    ],
)
async def test_redirects_lead_nowhere_else(server: FaultServer, to: str, error: type[RowError]) -> None:
    assert type(await fails(server.url(f"/redirect?to={to}"))) is error
    assert server.requests.total() == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
async def test_loopback_is_forbidden_by_default(server: FaultServer, host: str) -> None:
    error = await fails(server.url("/picture/cat", host), allow_private=[])
    assert type(error) is ForbiddenAddress
    assert server.requests.total() == 0


@pytest.mark.parametrize("host", ["2130706433", "017700000001", "127.1"])
async def test_numbers_that_are_no_plain_addresses(server: FaultServer, host: str) -> None:
    error = await fails(server.url("/picture/cat", host))  # even with 127.0.0.0/8 opened
    assert type(error) in (ForbiddenAddress, InvalidUrl)
    assert server.requests.total() == 0


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://host/x", UnsupportedSource),
        ("file:///etc/passwd", UnsupportedSource),
        ("ws://127.0.0.1/x", UnsupportedSource),
        ("s3://bucket/x", UnsupportedSource),
        ("", UnsupportedSource),
        ("http://", InvalidUrl),
        ("http://[::1", InvalidUrl),
        ("http://host:99999/", InvalidUrl),
        ("http://me:p/ss@host/", InvalidUrl),
        ("http://" + "a" * 64 + ".com/", InvalidUrl),
        ("http://a..b/", InvalidUrl),
        ("http://a\0b/", NameResolutionFailed),
    ],
)
async def test_urls_that_cannot_be_fetched(url: str, error: type[RowError]) -> None:
    assert type(await fails(url, fetch_retries=0)) is error


async def test_one_failure_gives_up_the_row(server: FaultServer) -> None:
    start = time.monotonic()
    error = await fails(server.url("/picture/cat"), server.url("/drip"), server.url("/status/404"))
    assert type(error) is HttpStatus
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("blocks", [512, 40])  # 40: some wait for room
async def test_cancelling_gives_everything_back(server: FaultServer, blocks: int) -> None:
    async with fetching(blocks=blocks) as (fetcher, arena):
        images = [WebImage(server.url("/drip")), WebImage(server.url("/silent/headers")), InlineImage(b"x", "inline")]
        rows = [asyncio.create_task(fetcher.fetch(images[:count])) for count in (1, 2, 3)]
        rows += [asyncio.create_task(fetcher.fetch([WebImage(server.url("/status/503"))]))]
        await asyncio.sleep(0.1)
        assert arena.free_blocks < blocks
        for row in rows:
            row.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        assert arena.free_blocks == blocks


async def test_waiting_for_room_is_not_on_the_clock(server: FaultServer) -> None:
    async with fetching(blocks=32, fetch_timeout=0.3) as (fetcher, arena):
        [taken] = await arena.reserve([32 * BLOCK])
        row = asyncio.create_task(body(fetcher, arena, server.url("/picture/cat")))
        await asyncio.sleep(0.5)
        assert not row.done()
        arena.release(taken)
        assert await row == JUNK


async def test_nor_is_waiting_for_room_again_after_a_retry(server: FaultServer) -> None:
    async with fetching(blocks=32, fetch_timeout=0.6, backoff=0.1) as (fetcher, arena):
        row = asyncio.create_task(body(fetcher, arena, server.url("/flaky/503/1")))
        while not server.requests or arena.free_blocks < 32:
            await asyncio.sleep(0.01)
        [taken] = await arena.reserve([32 * BLOCK])
        await asyncio.sleep(0.8)
        arena.release(taken)
        assert await row == JUNK


@pytest.mark.parametrize("limits", [{"fetch_concurrency": 2}, {"fetch_per_host": 2}])
async def test_connections_are_limited_and_queueing_is_not_on_the_clock(
    server: FaultServer, limits: dict[str, int]
) -> None:
    async with fetching(fetch_timeout=0.8, fetch_retries=0, **limits) as (fetcher, arena):
        url = server.url("/picture/cat?wait=0.1&close=1")
        bodies = await asyncio.gather(*(body(fetcher, arena, url) for _ in range(20)))
    assert bodies == [JUNK] * 20  # 1 s in all, more than anybody's clock has
    assert server.most_open == 2


async def test_a_hosts_queue_does_not_hold_up_others(server: FaultServer) -> None:
    async with fetching(fetch_concurrency=8, fetch_per_host=1) as (fetcher, arena):
        slow = [asyncio.create_task(body(fetcher, arena, server.url("/picture/cat?wait=0.2"))) for _ in range(20)]
        await asyncio.sleep(0.05)
        start = time.monotonic()
        assert await body(fetcher, arena, server.url("/picture/cat", "localhost")) == JUNK
        assert time.monotonic() - start < 0.15
        for row in slow:
            row.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


async def test_more_rows_than_the_arena_has_room_for(server: FaultServer) -> None:
    async with fetching(blocks=40) as (fetcher, arena):
        images = [WebImage(server.url("/picture/cat")), WebImage(server.url("/picture/cat?length=no"))]

        async def row() -> None:
            fetched = await fetcher.fetch(images)
            assert contents(fetched, arena) == [JUNK, JUNK]
            fetched.release()

        async with asyncio.timeout(10):
            await asyncio.gather(*(row() for _ in range(50)))


@pytest.mark.parametrize("length", ["", "&length=no"])
async def test_a_picture_larger_than_its_share_is_fetched_once_more(server: FaultServer, length: str) -> None:
    async with fetching(blocks=16) as (fetcher, arena):
        # four pictures in 16 blocks: 2 blocks each at first
        large = server.url(f"/large?bytes={9 * BLOCK}{length}")
        small = [server.url(f"/large?bytes={count}") for count in (10, 20, 30)]
        fetched = await fetcher.fetch([WebImage(url) for url in (large, *small)])
        assert contents(fetched, arena) == [bytes(9 * BLOCK), bytes(10), bytes(20), bytes(30)]
        assert server.requests[large.removeprefix(server.url(""))] == 2
        fetched.release()


async def test_a_row_that_does_not_fit_the_arena(server: FaultServer) -> None:
    urls = [server.url(f"/large?bytes={9 * BLOCK}&n={n}") for n in range(2)]
    assert type(await fails(*urls, blocks=16)) is TooLarge
    urls = [server.url(f"/large?bytes={9 * BLOCK}&length=no&n={n}") for n in range(2)]
    assert type(await fails(*urls, blocks=16)) is TooLarge
    assert type(await fails(*[server.url("/picture/cat")] * 17, blocks=16)) is TooLarge


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("https://me:pw@h.org/a/b.jpg?sig=1&x=2#f", "https://h.org/a/b.jpg?…"),
        ("https://h.org:8443/@me/a.jpg", "https://h.org:8443/@me/a.jpg"),
        ("http://[::1]:80/a#secret", "http://[::1]:80/a"),
        ("http://me:p?w@h/", "http://…"),
        ("http://me:p/w@h/", "http://…"),
        ("me:pw@h/a", "h/a"),
        ("http://h\0\n/a", "http://h\ufffd\ufffd/a"),
        ("http://h/" + "x" * 2000, "http://h/" + "x" * 991 + "…"),
    ],
)
def test_labels_hold_no_secrets(url: str, label: str) -> None:
    assert source_label(WebImage(url)) == label


@pytest.mark.parametrize("scheme", ["http://", "https://", ""])
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_whatever_the_url_only_our_errors_come_out(scheme: str, rest: str) -> None:
    # No name is resolved and nothing is opened: what is tried is how far odd text gets.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", no_names)
        error = asyncio.run(fails(scheme + rest, allow_private=[], fetch_retries=0))
    assert isinstance(error, FetchError)


def no_names(host: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(host, str):
        host.encode("idna")  # as the real one does
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
