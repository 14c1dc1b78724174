"""Headers of tar archives: which members there are, and where their contents lie. Nothing is extracted.

Also what it takes to write a simple archive.

Formats: ustar and pax (IEEE Std 1003.1, "pax"), and GNU tar's long names (its manual, "Basic Tar Format").
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import Literal, NamedTuple

BLOCK = 512
MAX_EXTENSION = 2**20
"""Bytes of an extended header (pax) or of a long name (GNU): more is no name, but an attempt to fill memory."""
_READ_AHEAD = 8192
"""Headers of small members, such as captions, are near each other."""
_COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_END = bytes(BLOCK)
END = 2 * _END
"""What follows the last member."""
_SPARSE, _SPARSE_NAME = b"GNU.sparse.", b"GNU.sparse.name"
_RECORDS = (b"path", b"size", _SPARSE_NAME)
"""Keys of extended headers that say where a member is."""

Kind = Literal["file", "directory", "link", "sparse file", "special file"]
_KINDS: dict[bytes, Kind] = {
    **dict.fromkeys((b"0", b"\0", b"7"), "file"),
    **dict.fromkeys((b"1", b"2"), "link"),
    b"5": "directory",
    b"S": "sparse file",
}
_WITHOUT_CONTENTS = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Types whose size does not count, whatever it says."""


class TarError(Exception):
    """The archive is damaged, or is none. The message says where and how."""


class Member(NamedTuple):
    """A member of an archive."""

    name: str
    """As in the archive. Bytes that are not UTF-8 are surrogates."""
    kind: Kind
    header: int
    """Offset of its first header. Reading from there on finds it again."""
    start: int
    """Offset of its contents."""
    size: int
    after: int
    """Offset of the next member's first header."""


def member_header(name: str, size: int) -> bytes:
    """Return the header of a file (ustar). The same arguments always give the same bytes.

    Args:
        name: At most 100 characters of ASCII.
        size: Bytes of its contents, which follow, and then `padding`.
    """
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size: int) -> bytes:
    """Return what follows a member's contents, up to the next header."""
    return bytes(_padded(size) - size)


class _Header(NamedTuple):
    name: bytes
    type: bytes
    size: int


class TarHeaders:
    """The headers of an open archive. Only headers are read, not the contents between them.

    Args:
        fd: File descriptor of the archive.
        size: Bytes of the archive.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.position = 0
        """Offset up to which headers have been read."""
        self._fd, self._size = fd, size
        self._window, self._window_start = b"", 0

    def members(self, start: int = 0) -> Iterator[Member]:
        """Yield the members in order, from an offset on at which a member's first header is.

        Raises:
            TarError: The archive ends too early, or what follows is not a header.
        """
        if not self._size:
            raise TarError("has 0 bytes, expected a tar archive")
        while (member := self._checked_member(start)) is not None:
            self.position = start = member.after
            yield member
        self.position = self._size

    def read(self, member: Member) -> bytes:
        """Return a member's contents, of which there must be few. Raises TarError."""
        return self._read(member.start, member.size)

    def _checked_member(self, first: int) -> Member | None:
        try:
            return self._member(first)
        except TarError:
            if not first:
                _check_compression(self._pread(0, BLOCK))
            raise

    def _member(self, first: int) -> Member | None:
        """Return the member whose first header is at an offset; None at the archive's end."""
        at = first
        records: dict[bytes, bytes] = {}
        long_name: bytes | None = None
        while True:
            if at >= self._size and at == first:
                return None  # without the end marker, as some writers leave it
            block = self._read(at, BLOCK)
            if block == _END:
                if at == first:
                    return None
                raise TarError(f"ends at byte {at:,}, after an extended header")
            header = _parse(block, at)
            if header.type not in (b"x", b"X", b"g", b"L", b"K"):
                break
            if header.size > MAX_EXTENSION:
                raise TarError(f"has an extended header of {header.size:,} bytes at byte {at:,}")
            if header.type in (b"x", b"X"):
                records |= _pax_records(self._read(at + BLOCK, header.size), at)
            elif header.type == b"L":
                long_name = self._read(at + BLOCK, header.size).rstrip(b"\0")
            at += BLOCK + _padded(header.size)
        name = records.get(_SPARSE_NAME) or records.get(b"path") or long_name or header.name
        size = _pax_size(records[b"size"], at) if b"size" in records else header.size
        start = at + BLOCK + (self._sparse_map_bytes(at, block) if header.type == b"S" else 0)
        kind = _KINDS.get(header.type, "special file")
        if _SPARSE in records:
            kind = "sparse file"
        elif kind == "file" and name.endswith(b"/"):
            kind = "directory"  # as before POSIX
        if header.type in _WITHOUT_CONTENTS:
            size = 0
        text = name.decode(errors="surrogateescape")
        if start + size > self._size:
            raise TarError(f"ends at byte {self._size:,}, in the middle of its member {text!r:.200} (truncated?)")
        return Member(text, kind, first, start, size, start + _padded(size))

    def _sparse_map_bytes(self, at: int, block: bytes) -> int:
        """Return the bytes of the blocks that continue the map of a sparse file (GNU)."""
        size, is_continued = 0, block[482]
        while is_continued:
            size += BLOCK
            is_continued = self._read(at + size, BLOCK)[504]
        return size

    def _read(self, start: int, length: int) -> bytes:
        """Return bytes of the archive. Raises TarError at its end."""
        begin = start - self._window_start
        if begin < 0 or begin + length > len(self._window):
            self._window, self._window_start, begin = self._pread(start, max(length, _READ_AHEAD)), start, 0
            if len(self._window) < length:
                raise TarError(f"ends at byte {start + len(self._window):,}, where more is expected (truncated?)")
        return self._window[begin : begin + length]

    def _pread(self, start: int, length: int) -> bytes:
        try:
            return os.pread(self._fd, length, start)
        except OSError as error:
            raise TarError(f"cannot be read at byte {start:,}: {error.strerror}") from None


def _parse(block: bytes, at: int) -> _Header:
    try:
        if _number(block[148:156]) not in _checksums(block):
            raise ValueError("the checksum is wrong")
        name, size = block[:100].partition(b"\0")[0], _number(block[124:136])
    except ValueError as error:
        found = f"is damaged at byte {at:,}: not a header" if at else "is not a tar archive"
        raise TarError(f"{found}: {error}") from None
    if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _Header(name, block[156:157], size)


def _checksums(block: bytes) -> Iterator[int]:
    """Yield the checksum of a header, which counts itself as spaces; then that of old writers, with signed bytes."""
    unsigned = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    yield unsigned
    yield unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _check_compression(data: bytes) -> None:
    """Raise TarError if what is not a tar begins like a compressed file."""
    for magic, name in _COMPRESSIONS:
        if data.startswith(magic):
            raise TarError(f"is compressed with {name}; only uncompressed tar archives can be read") from None


def _number(field: bytes) -> int:
    """Return the value of a number: octal digits, or binary if the first bit is set (GNU). Raises ValueError."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise ValueError("a negative number")
        return int.from_bytes(field, "big") - (0x80 << 8 * (len(field) - 1))
    digits = field.partition(b"\0")[0].strip(b" ")
    if digits.strip(b"01234567"):
        raise ValueError(f"{digits!r} is not an octal number")
    return int(digits or b"0", 8)


def _pax_records(data: bytes, at: int) -> dict[bytes, bytes]:
    """Return the records that matter of an extended header, each of which is "LENGTH KEY=VALUE\\n"."""
    records = {}
    begin = 0
    while begin < len(data):
        digits = data[begin : begin + 20].partition(b" ")[0]
        end = begin + int(digits) if digits.isdigit() else 0
        key, equals, value = data[begin + len(digits) + 1 : end].partition(b"=")
        if not begin + len(digits) + 3 < end <= len(data) or not equals or not value.endswith(b"\n"):
            raise TarError(f"is damaged at byte {at:,}: a malformed extended header")
        if key.startswith(_SPARSE):
            records[_SPARSE] = b""
        if key in _RECORDS:
            records[key] = value[:-1]
        begin = end
    return records


def _pax_size(value: bytes, at: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise TarError(f"is damaged at byte {at:,}: a size of {value[:20]!r} bytes")
    return int(value)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
