"""Groups of rows go in in the manifest's order, and come out as their images arrive."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from batchvl.concurrency import ByteSemaphore
from batchvl.config.options import RunOptions
from batchvl.errors import HttpStatus, ManifestError
from batchvl.fetching.fetcher import Fetcher
from batchvl.images import fetch_ahead
from batchvl.images.fetch_ahead import FetchAhead, FetchedGroup
from batchvl.ipc.arena import Arena
from batchvl.types import ContentPart, Failure, ImageRef, InlineImage, Message, Request, Row, WebImage
from tests.fetching.test_dispatcher import OK, Answer, Web
from tests.timing import scaled

BLOCK, BLOCKS = 4096, 64
BUDGET = 1 << 20


def requests(rows: list[Row]) -> dict[int, Request | Failure]:
    return {row.number: Request(row.number, (Message("user", (ContentPart(image=0),)),)) for row in rows}


class Ahead:
    """The subject, its arena, and how far it has read."""

    def __init__(self, fetcher: Fetcher, arena: Arena) -> None:
        self.fetcher, self.arena, self.budget = fetcher, arena, ByteSemaphore(BUDGET)
        self.subject = FetchAhead(fetcher, requests, self.budget, self._set_aside)
        self.read = 0
        self.aside: list[int] = []

    def _set_aside(self, rows: list[Row], *_: bool) -> bool:
        self.aside += [row.number for row in rows]
        return True

    async def rows(self, images: list[list[ImageRef]], error: Exception | None = None) -> AsyncIterator[list[Row]]:
        for number, refs in enumerate(images):
            self.read = number + 1
            yield [Row(number, images=tuple(refs))]
        if error is not None:
            raise error

    def release(self, group: FetchedGroup) -> int:
        """Release what a group holds. Return the number of its row."""
        [row] = group.rows
        if group.fetched is not None:
            group.fetched.release()
        self.budget.release(row.inline_bytes)
        return row.number

    async def all(self, images: list[list[ImageRef]]) -> list[int]:
        """Return the rows in the order in which they come out."""
        async with aclosing(self.subject.groups(self.rows(images))) as groups:
            return [self.release(group) async for group in groups]


@asynccontextmanager
async def fetching_ahead(blocks: int = BLOCKS, **options: Any) -> AsyncIterator[Ahead]:
    arena = Arena(blocks, BLOCK)
    settings = {"allow_private": ["127.0.0.0/8"], "max_image_bytes": 64 * 1024, **options}
    async with Fetcher(RunOptions.of(**settings).fetch, arena) as fetcher, asyncio.timeout(scaled(30)):
        yield Ahead(fetcher, arena)
    assert arena.free_blocks == blocks
    arena.close()


async def always(host: str, path: str) -> Answer:
    return OK


async def test_rows_come_out_as_their_images_arrive() -> None:
    slow = asyncio.Event()

    async def answer(host: str, path: str) -> Answer:
        if path == "/0":
            await slow.wait()
        return OK

    async with Web(answer) as web, fetching_ahead(blocks=2048) as ahead:
        images: list[list[ImageRef]] = [[WebImage(web.url(f"/{number}"))] for number in range(10)]
        order = []
        async with aclosing(ahead.subject.groups(ahead.rows(images))) as groups:
            async for group in groups:
                order.append(ahead.release(group))
                if len(order) == 9:
                    slow.set()
    assert order[-1] == 0
    assert sorted(order) == list(range(10))


async def test_rows_of_every_kind_come_out_once() -> None:
    async def answer(host: str, path: str) -> Answer:
        return (404, {}, b"") if path == "/1" else OK

    async with Web(answer) as web, fetching_ahead() as ahead:
        inline = InlineImage(b"inline", "inline")
        kinds: list[list[ImageRef]] = [[], [WebImage(web.url("/1"))], [inline], [inline, WebImage(web.url("/2"))]]
        outcomes = {}
        async with aclosing(ahead.subject.groups(ahead.rows(kinds * 25))) as groups:
            async for group in groups:
                number = ahead.release(group)
                assert number not in outcomes
                outcomes[number] = (
                    type(group.error) if group.error else len(group.fetched.extents) if group.fetched else 0
                )
    assert outcomes == {number: [0, HttpStatus, 1, 2][number % 4] for number in range(100)}


async def test_a_manifest_is_not_read_further_than_its_rows_are_taken() -> None:
    async with fetching_ahead() as ahead:
        images: list[list[ImageRef]] = [[] for _ in range(5000)]
        taken = 0
        async with aclosing(ahead.subject.groups(ahead.rows(images))) as groups:
            async for group in groups:
                ahead.release(group)
                taken += 1
                assert ahead.read <= taken + 300
                if taken % 100 == 0:
                    await asyncio.sleep(0)
    assert taken == 5000


async def test_inline_images_are_bounded_by_their_budget() -> None:
    async with fetching_ahead(blocks=1024) as ahead:
        image = InlineImage(bytes(BUDGET // 4), "inline")
        ahead.fetcher._options = RunOptions.of().fetch
        async with aclosing(ahead.subject.groups(ahead.rows([[image]] * 20))) as groups:
            taken = 0
            async for group in groups:
                await asyncio.sleep(0.01)
                taken += 1
                assert ahead.read <= taken + 4
                ahead.release(group)
    assert taken == 20


async def test_an_error_of_the_reader_is_raised_once_all_that_is_ready_has_been_taken() -> None:
    async with fetching_ahead() as ahead:
        groups = ahead.subject.groups(ahead.rows([[]] * 10, ManifestError("gone")))
        taken = [ahead.release(await anext(groups)) for _ in range(10)]
        with pytest.raises(ManifestError, match="gone"):
            await anext(groups)
    assert taken == list(range(10))


@pytest.mark.parametrize("taken", [0, 1, 5])
async def test_closing_early_leaves_nothing(taken: int) -> None:
    async with Web(always) as web, fetching_ahead() as ahead:
        images: list[list[ImageRef]] = [[WebImage(web.url(f"/{number}"))] for number in range(200)]
        async with aclosing(ahead.subject.groups(ahead.rows(images))) as groups:
            for _ in range(taken):
                ahead.release(await anext(groups))
        assert not ahead.fetcher.waiting


async def test_waiting_takes_no_cpu() -> None:
    """Neither for a host that pauses, nor for a consumer that does not come."""

    async def answer(host: str, path: str) -> Answer:
        return (429, {"Retry-After": "50"}, b"") if host == web.hosts[0] else OK

    async with Web(answer, hosts=2) as web, fetching_ahead() as ahead:
        images: list[list[ImageRef]] = [[WebImage(web.url(f"/{number}", host=number % 2))] for number in range(5000)]
        async with aclosing(ahead.subject.groups(ahead.rows(images))) as groups:
            ahead.release(await anext(groups))
            await asyncio.sleep(1)
            cpu = time.process_time()
            await asyncio.sleep(1)
            assert time.process_time() - cpu < 0.2


async def test_a_host_that_pauses_does_not_keep_the_rows_behind_it_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows are all of that host, and more than may wait."""
    monkeypatch.setattr(fetch_ahead, "MAX_GROUPS", 50)

    async def answer(host: str, path: str) -> Answer:
        return (429, {"Retry-After": "50"}, b"") if host == web.hosts[0] else OK

    async with Web(answer, hosts=2) as web, fetching_ahead() as ahead:
        images: list[list[ImageRef]] = [[WebImage(web.url(f"/{n}", host=int(n >= 300)))] for n in range(400)]
        others = 0
        async with aclosing(ahead.subject.groups(ahead.rows(images))) as groups:
            async for group in groups:
                others += ahead.release(group) >= 300
                if others == 100:
                    break
