"""Which rows are done, and how: one bit a row, growing to either side, in memory and as text in a part's footer."""

from __future__ import annotations

import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator

from .record import Counts

_NOT_FULL = re.compile(rb"[^\xff]")
_NOT_EMPTY = re.compile(rb"[^\x00]")


class RowSet:
    """A set of row numbers, all >= 0. Takes (highest - lowest) / 8 bytes.

    >>> done = RowSet([3, 5])
    >>> 3 in done, 4 in done, len(done), list(done.missing(range(3, 7)))
    (True, False, 2, [4, 6])
    """

    __slots__ = ("_bits", "_first")

    def __init__(self, rows: Iterable[int] = ()) -> None:
        self._first = 0  # the byte, counted from row 0, that `_bits` starts with
        self._bits = bytearray()
        self.update(rows)

    def update(self, rows: Iterable[int]) -> None:
        """Takes the rows in; less than half as dear as one by one."""
        rows = list(rows)
        if rows:
            self._cover(min(rows) >> 3, (max(rows) >> 3) + 1)
            bits, first = self._bits, self._first
            for row in rows:
                bits[(row >> 3) - first] |= 1 << (row & 7)

    def add(self, row: int) -> None:
        """Takes the row in."""
        self._cover(row >> 3, (row >> 3) + 1)
        self._bits[(row >> 3) - self._first] |= 1 << (row & 7)

    def __contains__(self, row: object) -> bool:
        if not isinstance(row, int):
            return False
        at = (row >> 3) - self._first
        return 0 <= at < len(self._bits) and bool(self._bits[at] >> (row & 7) & 1)

    def __len__(self) -> int:
        """Counts the bits: a millisecond for ten million rows."""
        return int.from_bytes(self._bits, "little").bit_count()

    def __iter__(self) -> Iterator[int]:
        at = 0
        while found := _NOT_EMPTY.search(self._bits, at):
            at = found.start()
            byte = self._bits[at]
            yield from ((self._first + at) * 8 + bit for bit in range(8) if byte >> bit & 1)
            at += 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowSet) and self._stripped() == other._stripped()

    __hash__ = None  # type: ignore[assignment]

    def __ior__(self, other: RowSet) -> RowSet:
        if other._bits:
            self._cover(other._first, other._first + len(other._bits))
            start = other._first - self._first
            where = slice(start, start + len(other._bits))
            self._bits[where] = _or(self._bits[where], other._bits)
        return self

    def __isub__(self, other: RowSet) -> RowSet:
        start = max(self._first, other._first)
        stop = min(self._first + len(self._bits), other._first + len(other._bits))
        if start < stop:
            mine = slice(start - self._first, stop - self._first)
            self._bits[mine] = _without(self._bits[mine], other._bits[start - other._first : stop - other._first])
        return self

    def __sub__(self, other: RowSet) -> RowSet:
        found = RowSet()
        found |= self
        found -= other
        return found

    def missing(self, rows: range) -> Iterator[int]:
        """The rows of `rows` (step 1) that are not in the set, in order; runs of rows that are cost next to nothing."""
        row, end = rows.start, min(len(self._bits), (rows.stop + 7 >> 3) - self._first)
        while row < rows.stop:
            at = (row >> 3) - self._first
            if row & 7 == 0 and 0 <= at < end:
                found = _NOT_FULL.search(self._bits, at, end)
                row = max(row, ((found.start() if found else end) + self._first) * 8)
                if row >= rows.stop:
                    return
            if row not in self:
                yield row
            row += 1

    def count(self, rows: range) -> int:
        """How many of `rows` (step 1) are in the set."""
        bits = int.from_bytes(self._bits, "little")
        low, high = max(0, rows.start - self._first * 8), max(0, rows.stop - self._first * 8)
        return ((bits & ((1 << high) - 1)) >> low).bit_count()

    @classmethod
    def below(cls, stop: int) -> RowSet:
        """All rows from 0 to stop, stop not included.

        >>> list(RowSet.below(3))
        [0, 1, 2]
        """
        found = cls()
        found._bits = bytearray(b"\xff" * (stop >> 3))
        for row in range(stop & ~7, stop):
            found.add(row)
        return found

    @property
    def stop(self) -> int:
        """One more than the highest row; 0 where there is none."""
        first, bits = self._stripped()
        return (first + len(bits) - 1) * 8 + bits[-1].bit_length() if bits else 0

    def dump(self) -> str:
        """The set as text: the number of the first byte, a colon, the bytes' zlib stream in base64."""
        first, bits = self._stripped()
        return f"{first}:{b64encode(zlib.compress(bits)).decode()}"

    @classmethod
    def load(cls, text: str) -> RowSet:
        """The set back from `dump`. Raises ValueError where the text is none."""
        found = cls()
        first, _, data = text.partition(":")
        try:
            found._first, found._bits = int(first), bytearray(zlib.decompress(b64decode(data, validate=True)))
        except zlib.error as error:
            raise ValueError(f"no bitmap: {error}") from None
        return found

    def _stripped(self) -> tuple[int, bytes]:
        bits = self._bits.rstrip(b"\0")
        kept = bits.lstrip(b"\0")
        return (self._first + len(bits) - len(kept), bytes(kept)) if kept else (0, b"")

    def _cover(self, start: int, stop: int) -> None:
        if not self._bits:
            self._first = start
        elif start < self._first:
            self._bits[:0] = bytes(self._first - start)
            self._first = start
        short = stop - self._first - len(self._bits)
        if short > 0:
            self._bits += bytes(short)


def _or(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    return (int.from_bytes(a, "little") | int.from_bytes(b, "little")).to_bytes(len(a), "little")


def _without(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    return (int.from_bytes(a, "little") & ~int.from_bytes(b, "little")).to_bytes(len(a), "little")


class Outcomes:
    """The rows of a journal, a part or a shard: the ok ones, and the failed ones by error code."""

    def __init__(self, ok: RowSet | None = None, failed: dict[str, RowSet] | None = None) -> None:
        self.ok = ok if ok is not None else RowSet()
        self.failed = failed if failed is not None else {}

    def add(self, row: int, code: str | None) -> None:
        """Takes in a row; code is None where it is ok."""
        (self.ok if code is None else self.failed.setdefault(code, RowSet())).add(row)

    @classmethod
    def of(cls, results: Iterable[tuple[int, str | None]]) -> Outcomes:
        """Of rows, each with its error's code, or None where it is ok."""
        ok: list[int] = []
        failed: dict[str, list[int]] = {}
        for row, code in results:
            (ok if code is None else failed.setdefault(code, [])).append(row)
        return cls(RowSet(ok), {code: RowSet(rows) for code, rows in failed.items()})

    def counts(self) -> Counts:
        """How many rows, by result."""
        return Counts(len(self.ok), {code: len(rows) for code, rows in self.failed.items() if len(rows)})

    def rows(self) -> RowSet:
        """All rows, whatever their result."""
        found = RowSet()
        for rows in (self.ok, *self.failed.values()):
            found |= rows
        return found

    @classmethod
    def joined(cls, tallies: Iterable[Outcomes]) -> Outcomes:
        """One result for each row of several tallies, given in the order in which they win: ok before failed, then
        the earlier tally."""
        # Sets grow in place, and nothing else is gone through but the tallies' own rows: there may be thousands of
        # tallies of a few rows each, and the sets be of ten millions.
        found, failed = cls(), RowSet()
        for tally in tallies:
            found.ok |= tally.ok
            for code, rows in tally.failed.items():
                new = rows - failed
                failed |= rows
                known = found.failed.setdefault(code, RowSet())
                known |= new
        for rows in found.failed.values():
            rows -= found.ok
        return found
