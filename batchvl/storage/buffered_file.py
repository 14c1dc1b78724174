"""The file object that pyarrow writes to, under a temporary name until it is whole."""

from __future__ import annotations

import io
from pathlib import Path

from .disk import Disk

BUFFER_BYTES = 2**20


class BufferedFile(io.RawIOBase):
    """A file object whose writes go through `Disk`, so that they fail with the system's own errors.

    Writes are buffered, since a Parquet file consists of many small ones.

    Args:
        disk: Writes the file.
        path: Where the file is until it is published. Nothing is there yet.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk, self._path = disk, path
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

    def publish(self, path: Path) -> None:
        """Write the rest, close the file and give it its name. It is there on return, even after a power failure.

        Args:
            path: The finished file, on the same file system.
        """
        self._write_buffer()
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)
        self._disk.rename(self._path, path)
        self._disk.sync_directory(path.parent)

    def abandon(self) -> None:
        """Close and remove the file, unless it is published. Later writes are ignored.

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
        self._disk.discard(self._path)
