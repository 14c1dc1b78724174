"""Sets of rows, one bit per row, and the outcomes of rows as one set each; in memory and as text in a part's footer."""

from __future__ import annotations

import re
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator

from .record import Counts

_NOT_FULL = re.compile(rb"[^\xff]")
_NOT_EMPTY = re.compile(rb"[^\x00]")


class RowSet:
    """A set of row numbers, all >= 0. Takes (highest - lowest) / 8 bytes and grows to both sides.

    >>> done = RowSet([3, 5])
    >>> 3 in done, 4 in done, len(done), list(done.missing(range(3, 7)))
    (True, False, 2, [4, 6])
    """

    __slots__ = ("_bits", "_first")

    def __init__(self, rows: Iterable[int] = ()) -> None:
        self._first = 0  # index, counted from row 0, of the first byte in `_bits`
        self._bits = bytearray()
        self.update(rows)

    def update(self, rows: Iterable[int]) -> None:
        """Add rows, more than twice as fast as one by one."""
        rows = list(rows)
        if rows:
            self._cover(min(rows) >> 3, (max(rows) >> 3) + 1)
            bits, first = self._bits, self._first
            for row in rows:
                bits[(row >> 3) - first] |= 1 << (row & 7)

    def add(self, row: int) -> None:
        """Add a row."""
        self._cover(row >> 3, (row >> 3) + 1)
        self._bits[(row >> 3) - self._first] |= 1 << (row & 7)

    def __contains__(self, row: object) -> bool:
        if not isinstance(row, int):
            return False
        at = (row >> 3) - self._first
        return 0 <= at < len(self._bits) and bool(self._bits[at] >> (row & 7) & 1)

    def __len__(self) -> int:
        """Count the rows, in a millisecond for ten million."""
        return int.from_bytes(self._bits, "little").bit_count()

    def __iter__(self) -> Iterator[int]:
        at = 0
        while match := _NOT_EMPTY.search(self._bits, at):
            at = match.start()
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
            overlap = slice(start, start + len(other._bits))
            self._bits[overlap] = _or(self._bits[overlap], other._bits)
        return self

    def __isub__(self, other: RowSet) -> RowSet:
        start = max(self._first, other._first)
        stop = min(self._first + len(self._bits), other._first + len(other._bits))
        if start < stop:
            overlap = slice(start - self._first, stop - self._first)
            other_bits = other._bits[start - other._first : stop - other._first]
            self._bits[overlap] = _and_not(self._bits[overlap], other_bits)
        return self

    def __sub__(self, other: RowSet) -> RowSet:
        difference = RowSet()
        difference |= self
        difference -= other
        return difference

    def __and__(self, other: RowSet) -> RowSet:
        return self - (self - other)

    def missing(self, rows: range) -> Iterator[int]:
        """Yield the rows of a range (step 1) that are not in the set, in order. Skips runs of present rows quickly."""
        row, end = rows.start, min(len(self._bits), (rows.stop + 7 >> 3) - self._first)
        while row < rows.stop:
            at = (row >> 3) - self._first
            if row & 7 == 0 and 0 <= at < end:
                match = _NOT_FULL.search(self._bits, at, end)
                row = max(row, ((match.start() if match else end) + self._first) * 8)
                if row >= rows.stop:
                    return
            if row not in self:
                yield row
            row += 1

    def count(self, rows: range) -> int:
        """Return how many rows of a range (step 1) are in the set."""
        bits = int.from_bytes(self._bits, "little")
        low, high = max(0, rows.start - self._first * 8), max(0, rows.stop - self._first * 8)
        return ((bits & ((1 << high) - 1)) >> low).bit_count()

    @classmethod
    def below(cls, stop: int) -> RowSet:
        """Return the set of all rows from 0 to `stop`, exclusive.

        >>> list(RowSet.below(3))
        [0, 1, 2]
        """
        rows = cls()
        rows._bits = bytearray(b"\xff" * (stop >> 3))
        for row in range(stop & ~7, stop):
            rows.add(row)
        return rows

    @property
    def stop(self) -> int:
        """One more than the highest row; 0 for an empty set."""
        first, bits = self._stripped()
        return (first + len(bits) - 1) * 8 + bits[-1].bit_length() if bits else 0

    def dump(self) -> str:
        """Return the set as text: the index of the first byte, a colon, the zlib-compressed bytes in base64."""
        first, bits = self._stripped()
        return f"{first}:{b64encode(zlib.compress(bits)).decode()}"

    @classmethod
    def load(cls, text: str) -> RowSet:
        """Return the set that `dump` encoded. Raises ValueError for other text."""
        rows = cls()
        first, _, data = text.partition(":")
        try:
            rows._first, rows._bits = int(first), bytearray(zlib.decompress(b64decode(data, validate=True)))
        except zlib.error as error:
            raise ValueError(f"invalid row set: {error}") from None
        return rows

    def _stripped(self) -> tuple[int, bytes]:
        """Return the index of the first byte that is not zero, and the bytes from there to the last such byte."""
        without_tail = self._bits.rstrip(b"\0")
        bits = without_tail.lstrip(b"\0")
        return (self._first + len(without_tail) - len(bits), bytes(bits)) if bits else (0, b"")

    def _cover(self, start: int, stop: int) -> None:
        """Extend `_bits` to the bytes from `start` to `stop`."""
        if not self._bits:
            self._first = start
        elif start < self._first:
            self._bits[:0] = bytes(self._first - start)
            self._first = start
        missing = stop - self._first - len(self._bits)
        if missing > 0:
            self._bits += bytes(missing)


def _or(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    return (int.from_bytes(a, "little") | int.from_bytes(b, "little")).to_bytes(len(a), "little")


def _and_not(a: bytes | bytearray, b: bytes | bytearray) -> bytes:
    return (int.from_bytes(a, "little") & ~int.from_bytes(b, "little")).to_bytes(len(a), "little")


class Outcomes:
    """The rows of a journal, a part or a shard by outcome: ok, or failed with an error code."""

    def __init__(self, ok: RowSet | None = None, failed: dict[str, RowSet] | None = None) -> None:
        self.ok = ok if ok is not None else RowSet()
        self.failed = failed if failed is not None else {}

    def add(self, row: int, code: str | None) -> None:
        """Add a row; `code` is None if it is ok."""
        (self.ok if code is None else self.failed.setdefault(code, RowSet())).add(row)

    @classmethod
    def of(cls, results: Iterable[tuple[int, str | None]]) -> Outcomes:
        """Return the outcomes of rows, each given with its error code, None if it is ok."""
        ok: list[int] = []
        failed: dict[str, list[int]] = {}
        for row, code in results:
            (ok if code is None else failed.setdefault(code, [])).append(row)
        return cls(RowSet(ok), {code: RowSet(rows) for code, rows in failed.items()})

    def counts(self) -> Counts:
        """Return the numbers of rows by outcome."""
        return Counts(len(self.ok), {code: len(rows) for code, rows in self.failed.items() if len(rows)})

    def rows(self) -> RowSet:
        """Return all rows, whatever their outcome."""
        union = RowSet()
        for rows in (self.ok, *self.failed.values()):
            union |= rows
        return union

    @classmethod
    def joined(cls, items: Iterable[Outcomes]) -> Outcomes:
        """Return one outcome for each row: ok takes precedence over failed, then the earlier item."""
        # Extend sets in place and touch only an item's own rows: there may be thousands of items of a few rows each,
        # and sets of ten million rows.
        result, failed = cls(), RowSet()
        for item in items:
            result.ok |= item.ok
            for code, rows in item.failed.items():
                new = rows - failed
                failed |= rows
                known = result.failed.setdefault(code, RowSet())
                known |= new
        for rows in result.failed.values():
            rows -= result.ok
        return result
