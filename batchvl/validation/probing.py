"""The pictures of some rows, really fetched and decoded: `Prober`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from ..config.options import RunOptions
from ..errors import RowError
from ..images.pipeline import ImagePipeline
from ..images.worker_pool import RowFailed
from ..types import Failure, Image, Request, Row
from .checks import Checks
from .problems import Problems
from .quantiles import Histogram
from .report import Probe


class Prober:
    """Fetches and decodes rows' pictures as a run does, by the same stages with the same limits, and makes nothing of
    them. An asynchronous context manager."""

    def __init__(self, options: RunOptions, roots: Sequence[Path], checks: Checks) -> None:
        self._options, self._roots, self._checks = options, roots, checks
        self._reading = asyncio.Lock()
        self._problems = Problems()
        self._bytes, self._pixels = Histogram(), Histogram()
        self._largest: tuple[int, int] | None = None
        self._rows = self._failed = self._pictures = 0
        self._fetch_seconds = self._decode_seconds = 0.0

    async def __aenter__(self) -> Prober:
        self._images = ImagePipeline(self._options.fetch, self._options.image, self._roots)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._images)
            await self._images.load(None, self._request)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def of(self, chunks: Iterator[list[Row]], done: Callable[[], object]) -> Probe:
        """What comes of all the rows; `done` is called after each of them.

        Raises ManifestError where they cannot be read, EngineLost where the image workers' host process died.
        """
        started = time.monotonic()
        rows = (row for chunk in chunks for row in chunk)
        tasks = [asyncio.create_task(self._work(rows, done)) for _ in range(self._options.fetch.fetch_concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        pictures = max(1, self._pictures)
        return Probe(
            self._rows, self._failed, self._pictures, self._bytes.spread(), self._pixels.spread(), self._largest,
            round(time.monotonic() - started, 3), round(self._fetch_seconds / pictures, 6),
            round(self._decode_seconds / pictures, 6), self._problems.found(),
        )  # fmt: skip

    async def _work(self, rows: Iterator[Row], done: Callable[[], object]) -> None:
        """One row after the other, until there is none."""
        while True:
            async with self._reading:
                row = await asyncio.to_thread(next, rows, None)  # whoever fetches meanwhile must not wait for it
                if row is None:
                    return
                await self._images.inline_budget.acquire(row.inline_bytes)
            try:
                await self._probe(row)
            except RowError as error:
                self._fail(row, error.code, str(error))
            except RowFailed as failed:
                self._fail(row, failed.failure.code, failed.failure.message)
            finally:
                self._images.inline_budget.release(row.inline_bytes)
            self._rows += 1
            done()

    async def _probe(self, row: Row) -> None:
        task = self._images.prepare_group([row])
        try:
            group = await task.get()
        finally:
            task.release()
        if isinstance(outcome := group.requests[row.number], Failure):
            raise RowFailed(outcome, group.images)
        self._fetch_seconds += group.fetch_seconds
        self._decode_seconds += group.prepare_seconds
        for image in group.images:
            self._take(image)

    def _request(self, row: Row) -> Request:
        request = self._checks.request(row)
        assert request is not None, "only rows that can be asked are sampled"
        return request

    def _take(self, image: Image) -> None:
        assert image.bytes is not None
        assert image.width is not None
        assert image.height is not None
        self._pictures += 1
        self._bytes.add(image.bytes)
        self._pixels.add(image.width * image.height)
        if self._largest is None or image.width * image.height > self._largest[0] * self._largest[1]:
            self._largest = image.width, image.height

    def _fail(self, row: Row, code: str, message: str) -> None:
        self._failed += 1
        self._problems.add(code, row.number, row.id, message)
