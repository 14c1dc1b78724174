"""The index of a text manifest: where every thousandth row begins, so that a shard does not read those before it, nor a
run that goes on those that are done. It grows as the manifest is read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from uuid import uuid4

import msgspec

STEP = 1000
_FORMAT = 2


class RowOffset(msgspec.Struct, frozen=True, array_like=True):
    """Where a row begins: bytes from its file's start, and lines before it."""

    offset: int = 0
    line: int = 0


class FileIndex(msgspec.Struct):
    """The places of a file's rows 0, STEP, 2 STEP, …, as far as they are known; of a compressed file none, for it has
    no seek.
    """

    places: list[RowOffset] = []
    rows: int | None = None
    """None while its end has not been reached."""


class Index(msgspec.Struct):
    """What is known of the files, which is all of each but the last, and as much of that as was read."""

    fingerprint: str = ""
    """The manifest's."""
    files: list[FileIndex] = []
    whole: bool = False
    """Whether these are all the files, with all their rows."""
    format: int = _FORMAT

    @property
    def rows(self) -> int | None:
        """The manifest's rows; None while its end has not been reached."""
        return self.seek(sys.maxsize)[1] if self.whole else None

    def seek(self, number: int) -> tuple[int, int, RowOffset]:
        """The last place known at or before a row: the file, the row that begins there, and the place.

        One file more than there are where all of them are known and the row is not in them.
        """
        start = 0
        for at, file in enumerate(self.files):
            if file.rows is None or number < start + file.rows:
                step = min((number - start) // STEP, len(file.places) - 1)
                return (at, start + step * STEP, file.places[step]) if file.places else (at, start, RowOffset())
            start += file.rows
        return len(self.files), start, RowOffset()

    def write(self, folder: Path) -> None:
        """Writes the index for other shards and later runs. What of two that write at once remains is right."""
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path_in(folder).name}.{uuid4().hex}"
        try:
            temporary.write_bytes(msgspec.json.encode(self))
            os.replace(temporary, path_in(folder))
        finally:
            temporary.unlink(missing_ok=True)


def path_in(folder: Path) -> Path:
    """Where an output folder holds the index."""
    return folder / "manifest-index.json"


def read(folder: Path, fingerprint: str) -> Index | None:
    """The index that another shard or an earlier run wrote; None where there is none for this manifest.

    It is not fsynced, since it can be made anew: one that a crash left torn counts as none.
    """
    try:
        found = msgspec.json.decode(path_in(folder).read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if (found.fingerprint, found.format) == (fingerprint, _FORMAT) else None
