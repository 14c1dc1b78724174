"""The index of a text manifest: where every thousandth row begins, so that a shard does not read those before it."""

from __future__ import annotations

import os
from bisect import bisect_right
from pathlib import Path
from uuid import uuid4

import msgspec

STEP = 1000
_FORMAT = 1


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a row begins: bytes from its file's start, and lines before it."""

    offset: int = 0
    line: int = 0


class FileIndex(msgspec.Struct):
    """A file's rows, and the places of rows 0, STEP, 2 STEP, …; of a compressed file no places, for it has no seek."""

    rows: int = 0
    places: list[Place] = []


class Index(msgspec.Struct):
    """What the first shard counted, for those after it."""

    fingerprint: str
    files: list[FileIndex]
    format: int = _FORMAT

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def seek(self, number: int) -> tuple[int, int, Place]:
        """The place at or before a row: the file, the row that begins there, and the place."""
        starts = [0]
        for file in self.files:
            starts.append(starts[-1] + file.rows)
        at = min(bisect_right(starts, number) - 1, len(self.files) - 1)
        places = self.files[at].places
        step = min((number - starts[at]) // STEP, len(places) - 1)
        return (at, starts[at] + step * STEP, places[step]) if places else (at, starts[at], Place())

    def write(self, folder: Path) -> None:
        """Writes the index for other shards. Two that write at once write the same."""
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
    """The index that another shard wrote; None where there is none for this manifest.

    It is not fsynced, since it can be made anew: one that a crash left torn counts as none.
    """
    try:
        found = msgspec.json.decode(path_in(folder).read_bytes(), type=Index)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found if (found.fingerprint, found.format) == (fingerprint, _FORMAT) else None
