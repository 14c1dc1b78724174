"""The index of a text manifest: the offset of every thousandth row.

With it a shard does not read the rows before its own, and a resumed run does not read those that are done. The index
grows as the manifest is read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import msgspec

STEP = 1000
"""Rows between two offsets."""
_FORMAT = 2


class RowOffset(msgspec.Struct, frozen=True, array_like=True):
    """The start of a row: bytes from its file's start, and lines before it."""

    offset: int = 0
    line: int = 0


class Position(NamedTuple):
    """A known start of a row."""

    file: int
    """The file's number; one past the last file for a row after the end of the manifest."""
    row: int
    """The number of the row that starts here."""
    offset: RowOffset


class FileIndex(msgspec.Struct):
    """The offsets of a file's rows 0, STEP, 2 STEP, …, as far as it was read; none for a compressed file, which cannot
    seek.
    """

    offsets: list[RowOffset] = msgspec.field(default_factory=list, name="places")
    rows: int | None = None
    """None until the file's end is reached."""


class Index(msgspec.Struct):
    """The offsets of all files read so far: all of each file but the last, which may be read in part."""

    fingerprint: str = ""
    """The manifest's fingerprint."""
    files: list[FileIndex] = []
    whole: bool = False
    """Whether these are all the files, with all their rows."""
    format: int = _FORMAT

    @property
    def rows(self) -> int | None:
        """The manifest's number of rows; None until its end is reached."""
        return self.end().row if self.whole else None

    def seek(self, number: int) -> Position:
        """Return the last known position at or before a row."""
        start = 0
        for at, file in enumerate(self.files):
            if file.rows is None or number < start + file.rows:
                if not file.offsets:
                    return Position(at, start, RowOffset())
                step = min((number - start) // STEP, len(file.offsets) - 1)
                return Position(at, start + step * STEP, file.offsets[step])
            start += file.rows
        return Position(len(self.files), start, RowOffset())

    def end(self) -> Position:
        """Return the last known position of all."""
        return self.seek(sys.maxsize)

    def write(self, directory: Path) -> None:
        """Write the index for other shards and later runs. If two processes write, one of the two files remains."""
        directory.mkdir(parents=True, exist_ok=True)
        path = path_in(directory)
        temporary = directory / f".{path.name}.{uuid4().hex}"
        try:
            temporary.write_bytes(msgspec.json.encode(self))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def path_in(directory: Path) -> Path:
    """Return the path of the index in an output directory."""
    return directory / "manifest-index.json"


def read(directory: Path, fingerprint: str) -> Index | None:
    """Return the index that another shard or an earlier run wrote; None if there is none for this manifest.

    The index is not fsynced, since it can be made again: one that a crash left torn counts as none.
    """
    try:
        index = msgspec.json.decode(path_in(directory).read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return index if (index.fingerprint, index.format) == (fingerprint, _FORMAT) else None
