"""The file that pyarrow writes into."""

from __future__ import annotations

import io
from pathlib import Path

from .disk import Disk

BUFFER_BYTES = 2**20


class BufferedFile(io.RawIOBase):
    """What pyarrow writes a file into, so that its writes go through `Disk` and fail with the system's own errors.

    They are gathered, since a Parquet file is made of many small ones.
    """

    def __init__(self, disk: Disk, path: Path) -> None:
        self._disk = disk
        self._fd: int | None = disk.create(path)
        self._position = 0
        self._held = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: object) -> int:
        size = len(self._held)
        self._held += memoryview(data).cast("B")  # type: ignore[arg-type]
        size = len(self._held) - size
        self._position += size
        if len(self._held) >= BUFFER_BYTES:
            self._put()
        return size

    def _put(self) -> None:
        held, self._held = self._held, bytearray()
        if self._fd is not None and held:
            self._disk.write(self._fd, held)

    def finish(self) -> None:
        """Writes what is left and closes the file: all of it is on the disk on return."""
        self._put()
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                self._disk.sync(fd)
            finally:
                self._disk.close(fd)

    def abandon(self) -> None:
        """Closes the file as it is, unless it is finished.

        From then on writes go nowhere: a Parquet writer that was not closed still writes its footer when it is
        collected, and the descriptor's number may be another file's by then.
        """
        self._held = bytearray()
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                self._disk.close(fd)
            except OSError:
                pass  # the failure that led here is the one to tell
