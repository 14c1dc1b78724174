"""Text files as streams of blocks and lines, compressed or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from ...errors import ManifestError
from ..files import COMPRESSED_SUFFIXES

BLOCK = 2**18
MAX_LINE = 2**28
"""A longer line is truncated and its row fails, so that a file without line ends does not fill memory."""
_BOM = b"\xef\xbb\xbf"


class OversizedLine(bytes):
    """The first bytes of a line that is longer than MAX_LINE."""


class TextFile:
    """A text file, decompressed if its name has a suffix of COMPRESSED_SUFFIXES, without a UTF-8 byte order mark.

    Raises:
        ManifestError: The file cannot be read or decompressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.compressed = path.suffix.lower() in COMPRESSED_SUFFIXES
        try:
            # Unbuffered, since blocks are large.
            self._raw = pa.OSFile(str(path)) if self.compressed else open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror or error}") from None
        self._stream = self._raw
        if self.compressed:
            codec = "gzip" if path.suffix.lower() == ".gz" else "zstd"
            self._stream = pa.CompressedInputStream(self._raw, codec)

    def __enter__(self) -> TextFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._raw.close()

    def position(self) -> int:
        """Return the number of bytes read from disk so far, before decompression."""
        return int(self._raw.tell())

    def lines(self, start: int = 0) -> Iterator[tuple[bytes, int]]:
        """Yield the lines from a byte offset on, without line feeds, each with the offset of the next line."""
        if start:
            self._stream.seek(start)
        block = self._read_block()
        if not start and block.startswith(_BOM):
            block, start = block[len(_BOM) :], len(_BOM)
        after = start
        pending: list[bytes] = []
        size = 0  # of the pending line, before truncation
        while block:
            *lines, rest = block.split(b"\n")
            for line in lines:
                after += size + len(line) + 1
                if size:
                    line = _join(pending, line, size)
                    pending, size = [], 0
                yield line, after
            if size <= MAX_LINE:
                pending.append(rest)
            size += len(rest)
            block = self._read_block()
        if size:
            yield _join(pending, b"", size), after + size

    def _read_block(self) -> bytes:
        """Return the next block; empty at the end of the file."""
        try:
            return self._stream.read(BLOCK) or b""
        except (OSError, pa.ArrowException) as error:
            what = "cannot be decompressed (truncated?)" if self.compressed else "cannot be read"
            raise ManifestError(f"{self.path}: {what}: {error}") from None


def _join(pending: list[bytes], end: bytes, size: int) -> bytes:
    if size + len(end) > MAX_LINE:
        return OversizedLine(pending[0])
    return b"".join((*pending, end))
