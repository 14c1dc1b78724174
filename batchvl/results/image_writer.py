"""The writer of fetched images: collects rows on the event loop, and writes them into files on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..config.units import Shard
from ..storage.disk import Disk, as_stopped_early
from ..types import Image
from .fetched_files import ImageFile, create_file, file_path
from .fetched_rows import FileSchema, RowGroup
from .record import Record

GROUP_BYTES = 64 * 2**20
"""Bytes of a row group. Two are in memory: one that is collected, and one that is written."""
FILE_ROWS = 50_000
"""Rows after which a file is complete even if its images are small: they are recorded all at once."""


class ImageWriter:
    """Takes rows with their images, and writes them into complete files one after another.

    Args:
        directory: Where the files go.
        shard: The shard of the manifest that the rows are of.
        attempt: The attempt's number, which is part of the files' names.
        schema: The files' columns.
        fingerprint: The manifest's.
        file_bytes: Size at which a file is complete.
        disk: Writes the files.
    """

    def __init__(
        self,
        directory: Path,
        shard: Shard,
        attempt: int,
        schema: FileSchema,
        fingerprint: str,
        *,
        file_bytes: int,
        disk: Disk,
    ) -> None:
        self._directory, self._shard, self._attempt, self._schema = directory, shard, attempt, schema
        self._fingerprint, self._file_bytes, self._disk = fingerprint, file_bytes, disk
        self.on_complete: Callable[[list[Record]], object]
        """Called on the event loop's thread with the records of the rows of each complete file."""
        self.files = 0
        """Complete files."""
        self._number = 0
        """The number of the last file that was begun."""
        self._group_bytes = min(GROUP_BYTES, file_bytes)
        self._group, self._spare = RowGroup(), RowGroup()
        self._file: ImageFile | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "batchvl-images")
        self._writing: asyncio.Future[None] = self._loop.create_future()
        """The row group that is being written."""
        self._writing.set_result(None)
        self._turn = asyncio.Lock()

    async def add(
        self,
        row: int,
        id: int | str | None,
        cells: list[object],
        images: Sequence[Image],
        data: Sequence[bytes | memoryview],
    ) -> None:
        """Add a row. Waits while the disk is behind.

        Args:
            row: The row's number.
            id: Its id.
            cells: Its values in the columns besides the images.
            images: What is known of its images.
            data: The images' bytes, which are copied.

        Raises:
            StoppedEarly: The disk is full or failing.
        """
        async with self._turn:
            self._group.append(row, id, cells, images, data)
            if self._group.size >= self._group_bytes:
                await self._hand_over(is_last=False)

    async def finish(self) -> None:
        """Write all rows and complete the last file. Raises StoppedEarly."""
        async with self._turn:
            try:
                await self._hand_over(is_last=True)
                await self._written()
            finally:
                self._thread.shutdown()

    async def _hand_over(self, *, is_last: bool) -> None:
        """Let the thread write the rows that were collected, once it has written those before."""
        await self._written()
        group, self._group, self._spare = self._group, self._spare, self._group
        self._group.clear()
        self._writing = self._loop.run_in_executor(self._thread, self._write, group, is_last)

    async def _written(self) -> None:
        await asyncio.wait([self._writing])  # which, unlike awaiting it, does not cancel it with the task that waits
        self._writing.result()

    # The methods below run on the thread.

    def _is_full(self, file: ImageFile) -> bool:
        return file.size >= self._file_bytes or len(file.records) >= FILE_ROWS

    def _create(self) -> ImageFile:
        while True:
            self._number += 1
            path = file_path(self._directory, self._shard, self._attempt, self._number, self._schema.format)
            if not path.exists():  # attempts are numbered from 1 again if somebody has removed their records
                return create_file(path, self._schema, self._disk)

    def _write(self, group: RowGroup, is_last: bool) -> None:
        try:
            if group.rows:
                if self._file is None:
                    self._file = self._create()
                self._file.write(group)
            if self._file is not None and (is_last or self._is_full(self._file)):
                self._file.complete(self._shard, self._fingerprint)
                records, self._file = self._file.records, None
                self.files += 1
                self._loop.call_soon_threadsafe(self.on_complete, records)
        except BaseException as error:
            if self._file is not None:
                self._file.abandon()
            if isinstance(error, OSError):
                raise as_stopped_early(self._directory, error) from error
            raise
