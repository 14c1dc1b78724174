"""The fetcher against a real web server that misbehaves."""

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
from batchvl.fetching.download import Fetched
from batchvl.fetching.fetcher import Fetcher
from batchvl.fetching.sources import source_label
from batchvl.ipc.arena import Arena
from batchvl.types import FileImage, InlineImage, WebImage
from tests.faults.server import JUNK, FaultServer
from tests.fetching.objects import fetch_one
from tests.fuzzing import examples
from tests.timing import scaled

BLOCK = 4096
LIMIT = 64 * 1024
"""--max-image-bytes in these tests: 16 blocks."""


@pytest_asyncio.fixture
async def server() -> AsyncIterator[FaultServer]:
    async with FaultServer() as server:
        server.images["cat"] = JUNK
        yield server


@asynccontextmanager
async def fetching(blocks: int = 512, backoff: float = 0.01, **options: Any) -> AsyncIterator[tuple[Fetcher, Arena]]:
    """A fetcher for loopback. Checks at the end that nothing of the arena is still reserved."""
    defaults: dict[str, Any] = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": LIMIT, "fetch_timeout": scaled(5)}
    arena = Arena(blocks, BLOCK)
    async with Fetcher(RunOptions.of(**(defaults | options)).fetch, arena, backoff=backoff) as fetcher:
        yield fetcher, arena
    assert arena.free_blocks == blocks, "an extent was leaked"
    arena.close()


async def error_of(*urls: str, **options: Any) -> RowError:
    """Fetch a row and return the error that this raises."""
    async with fetching(**options) as (fetcher, _):
        with pytest.raises(RowError) as failed:
            await fetcher.fetch([WebImage(url) for url in urls])
        return failed.value


def contents(fetched: Fetched, arena: Arena) -> list[bytes | None]:
    return [bytes(arena.at(extent)) if extent else None for extent in fetched.extents]


async def test_a_row_with_every_kind_of_image(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        images = [
            WebImage(server.url("/image/cat")),
            FileImage("sub/dog.png"),
            InlineImage(b"inline", "data:image/gif (6 bytes)"),
            WebImage(server.url("/image/cat?length=no")),
        ]
        fetched = await fetcher.fetch(images)
        assert contents(fetched, arena) == [JUNK, None, b"inline", JUNK]
        # 10,240 bytes are 3 blocks; the rest of the 16 that each image had at first is free again.
        assert arena.free_blocks == 512 - 3 - 1 - 3
        fetched.release()


async def test_rows_without_images_or_with_only_files_take_no_space() -> None:
    async with fetching(blocks=1) as (fetcher, arena):
        assert (await fetcher.fetch([])).extents == ()
        fetched = await fetcher.fetch([FileImage("a.png")])
        assert arena.free_blocks == 1
        fetched.release()


async def test_the_headers_of_a_request(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        await fetch_one(
            fetcher, arena, server.url("/cookie", "localhost")
        )  # a name: cookie jars ignore cookies of addresses
        await fetch_one(fetcher, arena, server.url("/cookie", "localhost"))
        headers = server.headers["/cookie"]
        assert headers["User-Agent"].startswith("batchvl/")
        assert "Cookie" not in headers
        assert headers["Accept-Encoding"] == "identity"


async def test_a_proxy_in_the_environment_is_not_used(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url("/image/cat")) == JUNK


async def test_user_and_password_of_a_url_are_sent_but_never_shown(server: FaultServer) -> None:
    async with fetching() as (fetcher, _):
        url = server.url("/status/403?key=s3cret").replace("http://", "http://me:pa55@")
        with pytest.raises(HttpStatus, match="403") as failed:
            await fetcher.fetch([WebImage(url)])
        assert "Authorization" in server.headers["/status/403?key=s3cret"]
        assert not any(secret in str(failed.value) for secret in ("me:", "pa55", "s3cret"))


@pytest.mark.parametrize("code", [400, 401, 403, 404, 410, 451, 304])
async def test_a_permanent_status_is_not_retried(server: FaultServer, code: int) -> None:
    error = await error_of(server.url(f"/status/{code}"))
    assert type(error) is HttpStatus
    assert str(code) in str(error)
    assert server.requests[f"/status/{code}"] == 1


@pytest.mark.parametrize("code", [408, 425, 429, 500, 502, 503, 504])
async def test_a_transient_status_is_retried(server: FaultServer, code: int) -> None:
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url(f"/flaky/{code}/2")) == JUNK
    assert server.requests[f"/flaky/{code}/2"] == 3


async def test_the_number_of_retries_is_limited(server: FaultServer) -> None:
    error = await error_of(server.url("/status/500"), fetch_retries=2)
    assert type(error) is HttpRetryable
    assert error.retryable
    assert "500" in str(error)
    assert "after 3 attempts" in str(error)
    assert server.requests["/status/500"] == 3


async def test_retries_can_be_disabled(server: FaultServer) -> None:
    assert type(await error_of(server.url("/status/500"), fetch_retries=0)) is HttpRetryable
    assert server.requests["/status/500"] == 1


@pytest.mark.parametrize(("query", "least"), [("after=1", 1.0), ("after=0.0&date=1", 0.0), ("after=1&date=1", 1.0)])
async def test_retry_after_is_honored(server: FaultServer, query: str, least: float) -> None:
    async with fetching() as (fetcher, arena):
        start = time.monotonic()
        assert await fetch_one(fetcher, arena, server.url(f"/flaky/429/1?{query}")) == JUNK
        assert least <= time.monotonic() - start < least + scaled(1.5)


@pytest.mark.parametrize("query", ["after=3600", "after=3600&date=1"])
async def test_a_host_that_asks_for_too_much_patience_is_set_aside(server: FaultServer, query: str) -> None:
    error = await error_of(server.url(f"/flaky/429/1?{query}"), host_patience=0)
    assert type(error) is HttpRetryable
    assert "3,60" in str(error) or "3,59" in str(error)
    assert "has not responded" in str(error)
    assert server.requests.total() == 1


@pytest.mark.parametrize("code", [429, 503])
async def test_rejections_use_up_no_attempts(server: FaultServer, code: int) -> None:
    async with fetching(fetch_retries=0) as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url(f"/flaky/{code}/2")) == JUNK
    assert server.requests[f"/flaky/{code}/2"] == 3


async def test_no_space_is_held_while_waiting_for_a_retry(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena), asyncio.timeout(scaled(10)):
        fetch = asyncio.create_task(fetch_one(fetcher, arena, server.url("/flaky/503/1?after=1")))
        while not server.requests["/flaky/503/1?after=1"]:
            await asyncio.sleep(0.01)
        while arena.free_blocks < 512:
            await asyncio.sleep(0.01)
        assert server.requests["/flaky/503/1?after=1"] == 1, "the space is free only after the retry"
        assert await fetch == JUNK


async def test_inline_images_survive_a_retry(server: FaultServer) -> None:
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
async def test_an_incomplete_body_is_fetched_again(server: FaultServer, fault: str) -> None:
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url(f"/{fault}/2")) == JUNK
    assert server.requests[f"/{fault}/2"] == 3


@pytest.mark.parametrize("fault", ["reset", "short", "cut", "garbage"])
async def test_a_body_that_is_always_incomplete_fails(server: FaultServer, fault: str) -> None:
    error = await error_of(server.url(f"/{fault}"), fetch_retries=1)
    assert type(error) is ConnectionFailed
    assert server.requests[f"/{fault}"] >= 2


async def test_a_refused_connection() -> None:
    error = await error_of("http://127.0.0.1:9/x", host_patience=0)
    assert type(error) is ConnectionFailed
    assert "refused" in str(error)
    assert "127.0.0.1:9 has not responded" in str(error)


async def test_a_server_without_tls(server: FaultServer) -> None:
    error = await error_of(server.url("/image/cat").replace("http:", "https:"), fetch_retries=0)
    assert type(error) is ConnectionFailed


async def test_no_such_host() -> None:
    error = await error_of("http://no-such-host.invalid/x", fetch_retries=1)
    assert type(error) is NameResolutionFailed


@pytest.mark.parametrize("path", ["/silent/headers", "/silent/body"])
async def test_silence_is_noticed_early_enough_for_another_attempt(server: FaultServer, path: str) -> None:
    error = await error_of(server.url(path), fetch_timeout=scaled(0.5), fetch_retries=1, host_patience=0)
    assert type(error) is FetchTimeout
    assert server.requests[path] == 2


async def test_a_slow_body_is_a_timeout_and_the_deadline_covers_all_attempts(server: FaultServer) -> None:
    error = await error_of(server.url("/drip"), fetch_timeout=scaled(0.4), fetch_retries=0)
    assert type(error) is FetchTimeout
    start = time.monotonic()
    limits = {"fetch_timeout": scaled(0.4), "fetch_deadline": scaled(1), "fetch_retries": 100}
    error = await error_of(server.url("/drip"), **limits)
    assert type(error) is FetchTimeout
    assert "--fetch-deadline" in str(error)
    assert time.monotonic() - start < scaled(2)


@pytest.mark.parametrize("length", ["", "&length=no"])
async def test_too_many_bytes(server: FaultServer, length: str) -> None:
    size = 200 * LIMIT
    error = await error_of(server.url(f"/large?bytes={size}{length}"))
    assert type(error) is TooManyBytes
    assert server.sent < size / 2, "the client did not stop reading"
    assert server.requests.total() == 1


async def test_exactly_max_image_bytes_are_allowed(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url(f"/large?bytes={LIMIT}")) == bytes(LIMIT)
        assert await fetch_one(fetcher, arena, server.url(f"/large?bytes={LIMIT}&length=no")) == bytes(LIMIT)
        with pytest.raises(TooManyBytes):
            await fetcher.fetch([WebImage(server.url(f"/large?bytes={LIMIT + 1}&length=no"))])
        with pytest.raises(TooManyBytes):
            await fetcher.fetch([InlineImage(bytes(LIMIT + 1), "inline")])


async def test_the_limit_holds_after_content_encoding(server: FaultServer) -> None:
    assert type(await error_of(server.url(f"/bomb?bytes={1000 * LIMIT}"))) is TooManyBytes
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url("/bomb?bytes=50000")) == bytes(50000)


async def test_empty_images_are_errors(server: FaultServer) -> None:
    assert type(await error_of(server.url("/empty"))) is EmptyImage
    async with fetching() as (fetcher, _):
        with pytest.raises(EmptyImage):
            await fetcher.fetch([InlineImage(b"", "inline")])


async def test_html_is_fetched_and_left_to_the_decoder(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        assert (await fetch_one(fetcher, arena, server.url("/html"))).startswith(b"<!DOCTYPE")


async def test_redirects_are_followed_up_to_a_limit(server: FaultServer) -> None:
    target = f"to={server.url('/image/cat')}"
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, server.url(f"/redirect?hops=5&{target}")) == JUNK
    assert type(await error_of(server.url(f"/redirect?hops=6&{target}"))) is TooManyRedirects
    assert type(await error_of(server.url("/loop"))) is TooManyRedirects


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("file:///etc/passwd", UnsupportedSource),
        ("ftp://127.0.0.1/x", UnsupportedSource),
        ("http://10.0.0.1/x", ForbiddenAddress),
        ("http://169.254.169.254/latest/meta-data/", ForbiddenAddress),
        ("http://[::1]/x", ForbiddenAddress),
        ("http://", InvalidUrl),
    ],
)
async def test_redirects_to_other_schemes_and_addresses_fail(
    server: FaultServer, target: str, error: type[RowError]
) -> None:
    assert type(await error_of(server.url(f"/redirect?to={target}"))) is error
    assert server.requests.total() == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0x7f.1", "[::ffff:127.0.0.1]"])
async def test_loopback_is_forbidden_by_default(server: FaultServer, host: str) -> None:
    error = await error_of(server.url("/image/cat", host), allow_private=[])
    assert type(error) is ForbiddenAddress
    assert server.requests.total() == 0


@pytest.mark.parametrize("host", ["2130706433", "017700000001", "127.1"])
async def test_irregular_addresses_are_forbidden(server: FaultServer, host: str) -> None:
    error = await error_of(server.url("/image/cat", host))  # although 127.0.0.0/8 is allowed
    assert type(error) in (ForbiddenAddress, InvalidUrl)
    assert server.requests.total() == 0


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("ftp://host/x", UnsupportedSource),
        ("file:///etc/passwd", UnsupportedSource),
        ("ws://127.0.0.1/x", UnsupportedSource),
        ("s3://bucket/x", ForbiddenAddress),
        ("", UnsupportedSource),
        ("http://", InvalidUrl),
        ("http://[::1", InvalidUrl),
        ("http://host:99999/", InvalidUrl),
        ("http://me:p/ss@host/", InvalidUrl),
        ("http://" + "a" * 64 + ".com/", InvalidUrl),
        ("http://a..b/", InvalidUrl),
        ("http://a\0b/", InvalidUrl),
    ],
)
async def test_urls_that_cannot_be_fetched(url: str, error: type[RowError]) -> None:
    assert type(await error_of(url, fetch_retries=0)) is error


async def test_one_failed_image_fails_the_row_immediately(server: FaultServer) -> None:
    start = time.monotonic()
    error = await error_of(server.url("/image/cat"), server.url("/drip"), server.url("/status/404"))
    assert type(error) is HttpStatus
    assert time.monotonic() - start < scaled(1)


@pytest.mark.parametrize("blocks", [512, 40])  # 40: some wait for space
async def test_cancelling_frees_all_space(server: FaultServer, blocks: int) -> None:
    async with fetching(blocks=blocks) as (fetcher, arena):
        images = [WebImage(server.url("/drip")), WebImage(server.url("/silent/headers")), InlineImage(b"x", "inline")]
        rows = [asyncio.create_task(fetcher.fetch(images[:count])) for count in (1, 2, 3)]
        rows += [asyncio.create_task(fetcher.fetch([WebImage(server.url("/status/503"))]))]
        while server.requests.total() < 2:
            await asyncio.sleep(0.01)
        for row in rows:
            row.cancel()
        await asyncio.gather(*rows, return_exceptions=True)
        assert arena.free_blocks == blocks


async def test_the_timeout_does_not_count_waiting_for_space(server: FaultServer) -> None:
    async with fetching(blocks=32, fetch_timeout=scaled(0.3)) as (fetcher, arena):
        rows = [await fetcher.fetch([WebImage(server.url(f"/large?bytes={LIMIT}&n={n}"))]) for n in range(2)]
        assert not arena.free_blocks
        row = asyncio.create_task(fetch_one(fetcher, arena, server.url("/image/cat")))
        await asyncio.sleep(scaled(0.5))
        assert not row.done()
        rows.pop().release()
        assert await row == JUNK
        rows.pop().release()


@pytest.mark.parametrize("limits", [{"fetch_concurrency": 2}, {"fetch_per_host": 2}])
async def test_connections_are_limited_and_the_timeout_does_not_count_the_queue(
    server: FaultServer, limits: dict[str, int]
) -> None:
    async with fetching(fetch_timeout=scaled(0.8), fetch_retries=0, **limits) as (fetcher, arena):
        url = server.url(f"/image/cat?wait={scaled(0.1)}&close=1")
        bodies = await asyncio.gather(*(fetch_one(fetcher, arena, f"{url}&n={n}") for n in range(20)))
    assert bodies == [JUNK] * 20  # at least 1 s in total, more than the timeout of each
    assert server.max_open == 2


async def test_the_queue_of_one_host_does_not_delay_others(server: FaultServer) -> None:
    async with fetching(fetch_concurrency=8, fetch_per_host=1) as (fetcher, arena):
        slow = [
            asyncio.create_task(fetch_one(fetcher, arena, server.url(f"/image/cat?wait={scaled(0.2)}&n={n}")))
            for n in range(20)
        ]
        while not server.open:
            await asyncio.sleep(0.01)
        start = time.monotonic()
        assert await fetch_one(fetcher, arena, server.url("/image/cat", "localhost")) == JUNK
        assert time.monotonic() - start < scaled(0.15)
        for row in slow:
            row.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


async def test_more_rows_than_fit_the_arena(server: FaultServer) -> None:
    async with fetching(blocks=40) as (fetcher, arena):
        images = [WebImage(server.url("/image/cat")), WebImage(server.url("/image/cat?length=no"))]

        async def row() -> None:
            fetched = await fetcher.fetch(images)
            assert contents(fetched, arena) == [JUNK, JUNK]
            fetched.release()

        async with asyncio.timeout(scaled(10)):
            await asyncio.gather(*(row() for _ in range(50)))


@pytest.mark.parametrize("length", ["", "&length=no"])
async def test_a_row_that_nearly_fills_the_arena(server: FaultServer, length: str) -> None:
    async with fetching(blocks=16) as (fetcher, arena):
        large = server.url(f"/large?bytes={9 * BLOCK}{length}")
        small = [server.url(f"/large?bytes={count}") for count in (10, 20, 30)]
        fetched = await fetcher.fetch([WebImage(url) for url in (large, *small)])
        assert contents(fetched, arena) == [bytes(9 * BLOCK), bytes(10), bytes(20), bytes(30)]
        fetched.release()


async def test_a_row_that_does_not_fit_the_arena_fails(server: FaultServer) -> None:
    urls = [server.url(f"/large?bytes={9 * BLOCK}&n={n}") for n in range(2)]
    assert type(await error_of(*urls, blocks=16)) is TooLarge
    urls = [server.url(f"/large?bytes={9 * BLOCK}&length=no&n={n}") for n in range(2)]
    assert type(await error_of(*urls, blocks=16)) is TooLarge
    urls = [server.url(f"/image/cat?n={n}") for n in range(17)]
    assert type(await error_of(*urls, blocks=16)) is TooLarge


async def test_rows_with_several_images_do_not_wait_for_each_other_forever(server: FaultServer) -> None:
    async with fetching(blocks=16) as (fetcher, arena), asyncio.timeout(scaled(20)):

        async def row(number: int) -> None:
            urls = [server.url(f"/large?bytes={5 * BLOCK}&row={number}&image={image}") for image in range(3)]
            fetched = await fetcher.fetch([*map(WebImage, urls), InlineImage(b"inline", "inline")])
            assert contents(fetched, arena) == [bytes(5 * BLOCK)] * 3 + [b"inline"]
            fetched.release()

        await asyncio.gather(*map(row, range(10)))


async def test_a_url_is_downloaded_once_for_all_rows(server: FaultServer) -> None:
    async with fetching() as (fetcher, arena):
        url = server.url(f"/image/cat?wait={scaled(0.1)}")
        assert await asyncio.gather(*(fetch_one(fetcher, arena, url + f"#{n}") for n in range(5))) == [JUNK] * 5
        assert await fetch_one(fetcher, arena, url) == JUNK
        assert server.requests.total() == 1
        for _ in range(2):
            with pytest.raises(HttpStatus):
                await fetch_one(fetcher, arena, server.url("/status/404"))
        assert server.requests["/status/404"] == 1


async def test_an_unused_image_gives_way_to_others(server: FaultServer) -> None:
    async with fetching(blocks=16) as (fetcher, arena):
        for number in (0, 1, 0):
            url = server.url(f"/large?bytes={LIMIT}&n={number}")
            assert await fetch_one(fetcher, arena, url) == bytes(LIMIT)
    assert server.requests.total() == 3


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
def test_labels_contain_no_secrets(url: str, label: str) -> None:
    assert source_label(WebImage(url)) == label


@pytest.mark.parametrize("scheme", ["http://", "https://", ""])
@settings(max_examples=examples(60), deadline=None)
@given(st.text(max_size=40))
def test_any_url_raises_a_fetch_error(scheme: str, rest: str) -> None:
    # No name resolves and no network is allowed: this tests how odd text is handled.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", no_names)
        error = asyncio.run(error_of(scheme + rest, allow_private=[], fetch_retries=0))
    assert isinstance(error, FetchError)


def no_names(host: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(host, str):
        host.encode("idna")  # as the real function does
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
