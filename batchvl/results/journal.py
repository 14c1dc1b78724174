"""The journal: records in order of arrival, appended and fsynced, until a part holds them.

A segment is a header (magic, format, attempt, retry) followed by frames. A frame is the length and the CRC-32 of the
payload, 4 bytes each, little endian, then the payload, a record as msgpack. Only whole frames count: a reader stops at
the first one that is not, whether it was torn by a crash or never written (zeros: an empty payload is invalid).
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
    """Return the payload as a frame."""
    return _pack_frame(len(payload), crc32(payload)) + payload


def frames(data: bytes) -> Iterator[memoryview]:
    """Yield the payloads of whole frames, up to the first one that is not."""
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
    """The fields of a record that resuming and sorting need; the decoder skips the rest."""

    row: int
    status: Status
    error: _Code | None = None


_decode_outline = msgspec.msgpack.Decoder(_Outline).decode


class Entry(NamedTuple):
    """A record in a segment, not decoded. Sorts by row, then ok before failed."""

    row: int
    failed: bool
    code: str
    """The error code, "" if there is none."""
    payload: memoryview


@dataclass(frozen=True)
class Journal:
    """The whole frames of a segment that was read."""

    attempt: int
    retry: int
    data: bytes
    """The frames."""

    @classmethod
    def read(cls, path: Path, skip: int = 0) -> Journal:
        """Read a segment and sync it to the disk, since its writer may have died before that.

        Args:
            path: The segment.
            skip: Bytes of whole frames after the header that the caller knows already.

        Raises:
            FileNotFoundError: the segment does not exist, perhaps because a part replaced it.
            OSError: it cannot be read.
            ResumeError: it has a later format or is not a journal.
        """
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EROFS, errno.EINVAL):
                    raise
            header = file.read(_HEADER.size)
            file.seek(skip, os.SEEK_CUR)
            data = file.read(max(0, size - file.tell()))
        if len(header) < _HEADER.size:
            return cls(0, 0, b"")  # its writer died while writing the header, before any record
        magic, number, attempt, retry = _HEADER.unpack_from(header)
        if magic == bytes(len(MAGIC)):
            return cls(0, 0, b"")  # the same, on a file system that extends files before it fills them
        if magic != MAGIC:
            raise ResumeError(f"{path}: not a batchvl journal: move it out of the output directory and run again")
        if number > FORMAT:
            raise ResumeError(f"{path}: has format {number}; this version reads up to format {FORMAT}: upgrade batchvl")
        return cls(attempt, retry, data)

    def entries(self) -> Iterator[Entry]:
        """Yield the records' outlines, in the order of writing."""
        for payload in frames(self.data):
            outline = _decode_outline(payload)
            yield Entry(outline.row, outline.status == "failed", outline.error.code if outline.error else "", payload)

    def outcomes(self) -> Outcomes:
        """Return the rows by outcome."""
        return Outcomes.of((entry.row, entry.code if entry.failed else None) for entry in self.entries())


class Tail:
    """A segment that is read repeatedly while it is written, each time only what is new."""

    attempt = retry = 0

    def __init__(self, path: Path) -> None:
        self.outcomes = Outcomes()
        self._path, self._read = path, 0

    def follow(self) -> None:
        """Add new records to `outcomes`. Raises what `Journal.read` raises."""
        journal = Journal.read(self._path, self._read)
        self.attempt, self.retry = journal.attempt, journal.retry
        for entry in journal.entries():
            self.outcomes.add(entry.row, entry.code if entry.failed else None)
            self._read += _FRAME.size + len(entry.payload)


class Segment:
    """The segment that is being written."""

    def __init__(self, path: Path, attempt: int, retry: int, disk: Disk) -> None:
        """Create the file. Raises OSError, in particular FileExistsError."""
        self.path = path
        self.rows = 0
        self._disk = disk
        self._fd = disk.create(path)
        self.size = _HEADER.size
        try:
            disk.write(self._fd, _HEADER.pack(MAGIC, FORMAT, attempt, retry))
            disk.sync(self._fd)
            disk.sync_directory(path.parent)
        except OSError:
            disk.close(self._fd)
            raise

    def append(self, frames: list[bytes]) -> None:
        """Write the frames; they are on the disk on return. If it raises OSError, none of them counts as written."""
        data = b"".join(frames)
        self._disk.write(self._fd, data)
        self._disk.sync(self._fd)
        if os.fstat(self._fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the journal was deleted while it was written", str(self.path))
        self.rows += len(frames)
        self.size += len(data)

    def close(self) -> None:
        """Close the file. Raises OSError."""
        self._disk.close(self._fd)
