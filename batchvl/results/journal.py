"""The journal: records as they come, appended and fsynced, until a part holds them.

A segment is a header (magic, format, attempt, retry), then frames: length and CRC-32 of the payload, each 4 bytes,
little endian, then the payload, a record as msgpack. A frame counts only where it is whole: reading ends at the first
one that is not, be it torn by a crash or never written (zeros: a frame of no bytes is none).
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import msgspec

from ..errors import ResumeError
from ..storage.disk import Disk
from .record import Status
from .rowset import Outcomes

FORMAT = 1
MAGIC = b"batchvlJ"
_HEADER = struct.Struct("<8sIII")
_FRAME = struct.Struct("<II")
_pack_frame, _unpack_frame = _FRAME.pack, _FRAME.unpack_from


def frame(payload: bytes) -> bytes:
    """The payload as a frame."""
    return _pack_frame(len(payload), crc32(payload)) + payload


def frames(data: bytes) -> Iterator[memoryview]:
    """The payloads of the whole frames, up to the first one that is not."""
    view, start, end = memoryview(data), 0, len(data)
    while start + 8 <= end:
        length, checksum = _unpack_frame(data, start)
        start += 8
        payload = view[start : start + length]
        if not length or start + length > end or crc32(payload) != checksum:
            return
        yield payload
        start += length


class _Code(msgspec.Struct):
    code: str


class _Outline(msgspec.Struct):
    """As much of a record as resume and sorting need: the decoder skips the rest."""

    row: int
    status: Status
    error: _Code | None = None


_outline = msgspec.msgpack.Decoder(_Outline).decode


class Entry(NamedTuple):
    """A record in a segment, not decoded. Sorts by row, then ok before failed."""

    row: int
    failed: bool
    code: str
    """The error's code, "" where there is none."""
    payload: memoryview


@dataclass(frozen=True)
class Journal:
    """A segment as it was read: whole frames only."""

    attempt: int
    retry: int
    data: bytes
    """The frames."""

    @classmethod
    def read(cls, path: Path, skip: int = 0) -> Journal:
        """Reads a segment, and sees to it that what is read is on the disk (its writer may have died before that).

        skip: bytes of whole frames, from the first one on, that the caller knows already: they are not read again.
        Raises FileNotFoundError, other OSErrors, and ResumeError for a file of a later format or of none.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EINVAL):
                    raise
            head = file.read(_HEADER.size)
            file.seek(skip, os.SEEK_CUR)
            data = file.read(max(0, size - file.tell()))
        if len(head) < _HEADER.size:
            return cls(0, 0, b"")  # its writer died over the header: no record was ever in it
        magic, number, attempt, retry = _HEADER.unpack_from(head)
        if magic == bytes(len(MAGIC)):
            return cls(0, 0, b"")  # the same, on a file system that grows files before it fills them
        if magic != MAGIC:
            raise ResumeError(f"{path}: is no journal of batchvl: move it out of the output folder and run again")
        if number > FORMAT:
            raise ResumeError(f"{path}: has format {number}; this batchvl reads up to {FORMAT}: use a later version")
        return cls(attempt, retry, data)

    def entries(self) -> Iterator[Entry]:
        """The records' outlines, in the order of writing."""
        for payload in frames(self.data):
            found = _outline(payload)
            yield Entry(found.row, found.status == "failed", found.error.code if found.error else "", payload)

    def tally(self) -> Outcomes:
        """The rows, by result."""
        return Outcomes.of((entry.row, entry.code if entry.failed else None) for entry in self.entries())


class Tail:
    """A segment that is read again and again while it is written, each time only what is new."""

    attempt = retry = 0

    def __init__(self, path: Path) -> None:
        self.tally = Outcomes()
        self._path, self._read = path, 0

    def follow(self) -> None:
        """Takes the records since the last time into `tally`. Raises what `Journal.read` raises."""
        found = Journal.read(self._path, self._read)
        self.attempt, self.retry = found.attempt, found.retry
        for entry in found.entries():
            self.tally.add(entry.row, entry.code if entry.failed else None)
            self._read += _FRAME.size + len(entry.payload)


class Segment:
    """The segment that is being written."""

    def __init__(self, path: Path, attempt: int, retry: int, disk: Disk) -> None:
        """Creates the file. Raises OSError; FileExistsError where there is one."""
        self.path = path
        self.rows = 0
        self._disk = disk
        self._fd = disk.create(path)
        self.size = _HEADER.size
        try:
            disk.write(self._fd, _HEADER.pack(MAGIC, FORMAT, attempt, retry))
            disk.sync(self._fd)
            disk.sync_folder(path.parent)
        except OSError:
            disk.close(self._fd)
            raise

    def append(self, frames: list[bytes]) -> None:
        """Writes the frames; they are on the disk on return. Raises OSError: then none of them counts as written."""
        data = b"".join(frames)
        self._disk.write(self._fd, data)
        self._disk.sync(self._fd)
        if os.fstat(self._fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the journal was deleted while it was written", str(self.path))
        self.rows += len(frames)
        self.size += len(data)

    def close(self) -> None:
        """Closes the file. Raises OSError."""
        self._disk.close(self._fd)
