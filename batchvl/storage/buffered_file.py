"""The file object that pyarrow writes to."""

from __future__ import annotations

import io
from pathlib import Path

from .disk import Disk

BUFFER_BYTES = 2**20


class BufferedFile(io.RawIOBase):
    """A file object whose writes go through `Disk`, so that they fail with the system's own errors.

    Writes are buffered, since a Parquet file consists of many small ones.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._fd: int | None = disk.create(path)
        self._position = 0
        self._buffer = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: object) -> int:
        size = len(self._buffer)
        self._buffer += memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(self._buffer) - size
        self._position += size
        if len(self._buffer) >= BUFFER_BYTES:
            self._write_buffer()
        return size

    def _write_buffer(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        if self._fd is not None and data:
            self._disk.write(self._fd, data)

    def finish(self) -> None:
        """Write the rest and close the file: all of it is on the disk on return."""
        self._write_buffer()
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)

    def abandon(self) -> None:
        """Close the file without writing the rest, unless it is finished. Later writes are ignored.

        A Parquet writer that was not closed still writes its footer when it is garbage-collected, and by then the
        descriptor may belong to another file.
        """
        self._buffer = bytearray()
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                self._disk.close(fd)
            except OSError:
                pass  # the caller reports the original failure
