"""Fetch and decode the images of some rows."""

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
from .problems import Problems
from .quantiles import Histogram
from .report import Probe

MAX_ROWS = 256
"""Rows that are probed at the same time."""


class Prober:
    """Fetch and decode images as a run does, with the same limits, and measure them. An async context manager.

    Args:
        options: The run's options.
        roots: Directories that image files may be in, the manifest's first.
        make_request: Makes a row's request. Raises RowError.
    """

    def __init__(self, options: RunOptions, roots: Sequence[Path], make_request: Callable[[Row], Request]) -> None:
        self._concurrency, self._make_request = min(options.fetch.fetch_concurrency, MAX_ROWS), make_request
        self._pipeline = ImagePipeline(options.fetch, options.image, roots)
        self._reading = asyncio.Lock()
        self._problems = Problems()
        self._bytes, self._pixels = Histogram(), Histogram()
        self._largest: tuple[int, int] | None = None
        self._rows = self._failed = self._images = 0
        self._fetch_seconds = self._decode_seconds = 0.0

    async def __aenter__(self) -> Prober:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._pipeline)
            await self._pipeline.load(None, self._make_request)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def run(self, chunks: Iterator[list[Row]], on_row: Callable[[], object]) -> Probe:
        """Probe all the rows and return the result.

        Args:
            chunks: The rows. They are read in a thread.
            on_row: Called after each row.

        Raises:
            ManifestError: The rows cannot be read.
            EngineLost: The process that forks image workers died.
        """
        started = time.monotonic()
        rows = (row for chunk in chunks for row in chunk)
        tasks = [asyncio.create_task(self._work(rows, on_row)) for _ in range(self._concurrency)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        images = max(1, self._images)
        return Probe(
            rows=self._rows,
            failed=self._failed,
            images=self._images,
            bytes=self._bytes.quantiles(),
            pixels=self._pixels.quantiles(),
            largest=self._largest,
            seconds=round(time.monotonic() - started, 3),
            fetch_seconds=round(self._fetch_seconds / images, 6),
            decode_seconds=round(self._decode_seconds / images, 6),
            problems=self._problems.ranked(),
        )

    async def _work(self, rows: Iterator[Row], on_row: Callable[[], object]) -> None:
        """Probe one row after another until there are no more."""
        inline_budget = self._pipeline.inline_budget
        while True:
            async with self._reading:
                row = await asyncio.to_thread(next, rows, None)  # rows that are being fetched go on meanwhile
                if row is None:
                    return
                await inline_budget.acquire(row.inline_bytes)
            try:
                await self._probe(row)
            except RowError as error:
                self._fail(row, error.code, str(error))
            except RowFailed as failed:
                self._fail(row, failed.failure.code, failed.failure.message)
            finally:
                inline_budget.release(row.inline_bytes)
            self._rows += 1
            on_row()

    async def _probe(self, row: Row) -> None:
        task = self._pipeline.prepare_group(await self._pipeline.fetch(row))
        try:
            group = await task.get()
        finally:
            task.release()
        if isinstance(outcome := group.requests[row.number], Failure):
            raise RowFailed(outcome, group.images)
        self._fetch_seconds += group.fetch_seconds
        self._decode_seconds += group.prepare_seconds
        for image in group.images:
            self._measure(image)

    def _measure(self, image: Image) -> None:
        self._images += 1
        if image.bytes is not None:
            self._bytes.add(image.bytes)
        if image.width is not None and image.height is not None:
            pixels = image.width * image.height
            self._pixels.add(pixels)
            if self._largest is None or pixels > self._largest[0] * self._largest[1]:
                self._largest = image.width, image.height

    def _fail(self, row: Row, code: str, message: str) -> None:
        self._failed += 1
        self._problems.add(code, row.number, row.id, message)
