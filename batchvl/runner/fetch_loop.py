"""The core loop of a fetch: manifest -> fetch -> check -> file, with one task per row that has its images."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from ..concurrency import SharedTask, main_error
from ..errors import BatchvlError, RowError, TooLarge
from ..images.fetch_ahead import FetchedGroup
from ..images.pipeline import Buffer, EncodedGroup, ImagePipeline, image_stubs
from ..images.worker_pool import RowFailed
from ..results import Record, ResultStore
from ..results.image_writer import ImageWriter
from ..types import Failure, Image, Row
from .fetch_columns import FetchedColumns
from .passes import Passes, ReadRows
from .progress import FetchProgress

IN_FLIGHT = 256
"""Rows that are checked or wait for the disk."""
MAX_ROW_BYTES = 2**30
"""Bytes of all images of a row: offsets in Arrow's binary arrays have 31 bits."""


class FetchLoop:
    """Takes every row into a file, or into the store of results if it fails.

    Args:
        images: Fetches the images, and decodes them to check them.
        columns: The values that go with them.
        writer: Writes the files.
        store: The journal of results.
        progress: Counts what is finished.
        look_ahead: How far apart rows may be that share a download.
        decode: Whether images are decoded.
    """

    def __init__(
        self,
        images: ImagePipeline,
        columns: FetchedColumns,
        writer: ImageWriter,
        store: ResultStore,
        progress: FetchProgress,
        *,
        look_ahead: int,
        decode: bool,
    ) -> None:
        self._images, self._columns, self._writer = images, columns, writer
        writer.on_complete = self._record
        self._store, self._progress = store, progress
        self._look_ahead, self._decode = look_ahead, decode
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._intake: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.stopped: BatchvlError | None = None
        """Why no more rows are admitted, once that is so."""

    async def run(self, read: ReadRows) -> None:
        """Fetch all rows. Returns early if stopped; what has arrived is in a complete file in any case.

        Raises:
            BatchvlError: The fetch cannot continue.
        """
        passes = Passes(self._images, read, self._look_ahead)
        try:
            async with aclosing(passes.fetched()) as groups, asyncio.TaskGroup() as tasks:
                self._intake = tasks.create_task(self._admit(groups, tasks))
        except BaseExceptionGroup as group:
            raise main_error(group) from None
        finally:
            await self._writer.finish()

    def stop(self, reason: BatchvlError, grace: float) -> int:
        """Admit no more rows, and drop those that are not in a file yet. May be called from a signal handler."""
        if self.stopped is None:
            self.stopped = reason
            for task in (self._intake, *self._tasks):
                if task is not None:
                    task.cancel()
        return 0

    def _record(self, records: Sequence[Record]) -> None:
        """Record rows whose file is complete."""
        try:
            for record in records:
                self._store.add(record)
        except BatchvlError as error:  # this is a callback: nobody would see it
            self.stop(error, 0.0)

    async def _admit(self, groups: AsyncIterator[FetchedGroup], tasks: asyncio.TaskGroup) -> None:
        async for group in groups:
            for _ in group.rows:
                await self._slots.acquire()
            images = self._images.read_group(group, decode=self._decode)
            for row in group.rows:
                task = tasks.create_task(self._process_row(row, images))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _process_row(self, row: Row, images: SharedTask[EncodedGroup]) -> None:
        """Take one row to its end. Its slot and inline bytes are acquired."""
        try:
            await self._store.wait_for_capacity()
            await self._write(row, images)
        except RowError as error:
            self._fail(row, Failure.of(error), image_stubs(row))
        except RowFailed as error:
            self._fail(row, error.failure, error.images)
        finally:
            self._slots.release()
            self._images.inline_budget.release(row.inline_bytes)

    async def _write(self, row: Row, images: SharedTask[EncodedGroup]) -> None:
        if row.failure is not None:
            raise RowFailed(row.failure, image_stubs(row))
        infos: Sequence[Image] = ()
        data: list[Buffer] = []
        try:
            if row.images:
                group = await images.get()
                infos, data = group.images, group.data
            if (size := sum(map(len, data))) > MAX_ROW_BYTES:
                raise TooLarge(f"the row's images have {size:,} bytes, more than the {MAX_ROW_BYTES:,} of a file's row")
            await self._writer.add(row.number, row.id, self._columns.cells(row), infos, data)
            self._progress.add_images([len(item) for item in data])
        finally:
            images.release()

    def _fail(self, row: Row, failure: Failure, images: tuple[Image, ...]) -> None:
        record = Record(row.number, "failed", id=row.id, images=list(images), error=failure)
        self._store.add(record)
        self._progress.add_record(record)
