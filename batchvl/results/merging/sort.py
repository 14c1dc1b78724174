"""The rows of many parts in the manifest's order, each once, in bounded memory.

Row groups are read in the order of their first rows, each once, and held until all their rows have been output. Where
parts follow the manifest's order, as those of a run do, few are held at a time. Where they do not (a retry of rows from
all over the manifest), distant rows are spilled to files: see `spill.py`.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ...errors import BatchvlError
from ..parts import Group, Part
from .spill import SpillBuckets, row_numbers


@dataclass(frozen=True)
class Limits:
    """Approximate bounds on the memory, in bytes of decoded rows."""

    window: int = 2 * 2**20
    """Rows that are output together."""
    held: int = 16 * 2**20
    """Rows that are held before distant ones are spilled."""
    bucket: int = 8 * 2**20
    """Rows of a spill file, which is loaded as a whole."""


_RANK = (("attempt", pa.int32()), ("retry", pa.int32()))
_PRECEDENCE = [("row", "ascending"), ("failed", "ascending"), ("retry", "descending"), ("attempt", "ascending")]


class SortedRun:
    """Rows in ascending order, taken from the front."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._rows = row_numbers(table)
        self._at = 0
        self.size = int(table.nbytes)
        """Bytes, all of which stay in memory until the last row has been taken."""

    def __bool__(self) -> bool:
        return self._at < len(self._rows)

    def count_below(self, stop: int | None) -> int:
        """Return how many remaining rows are below `stop`, or how many remain if it is None."""
        return (len(self._rows) if stop is None else bisect_left(self._rows, stop, self._at)) - self._at

    def bytes_below(self, stop: int | None) -> int:
        """Return the approximate bytes of the remaining rows below `stop`."""
        return self.size * self.count_below(stop) // max(1, len(self._rows))

    def row_at(self, offset: int) -> int:
        """Return the number of a remaining row."""
        return self._rows[self._at + offset]

    def take(self, stop: int | None = None) -> pa.Table:
        """Remove and return the remaining rows below `stop`, or all."""
        rows = self.count_below(stop)
        self._at += rows
        return self._table.slice(self._at - rows, rows)


def read_sorted(
    parts: Sequence[Part], schema: pa.Schema, scratch: Path, limits: Limits = Limits()
) -> Iterator[pa.Table]:
    """Yield all rows of the parts in order, each once, in tables of about `limits.window` bytes.

    Of several records of a row, ok takes precedence over failed, then the later retry, then the lower attempt.

    Args:
        parts: Parts on a disk.
        schema: The output's schema.
        scratch: A directory for temporary files, which take at most as much space as the parts' rows.
        limits: Bounds on the memory.

    Raises:
        OSError: a temporary file cannot be written.
        BatchvlError: a part is damaged or cannot be read.
    """
    return _Sorter(parts, schema, scratch, limits).tables()


class _Sorter:
    """The state of `read_sorted`: row groups not read yet, rows held in memory, and rows in spill files."""

    def __init__(self, parts: Sequence[Part], schema: pa.Schema, scratch: Path, limits: Limits) -> None:
        self._parts, self._schema, self._limits = parts, schema, limits
        self._groups = sorted((group, number) for number, part in enumerate(parts) for group in part.groups)
        self._next_group = 0
        self._buckets = SpillBuckets([group for group, _ in self._groups], limits.bucket, scratch)
        self._held: list[SortedRun] = []
        self._max_held = limits.held

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows in order."""
        while True:
            bucket_start = self._buckets.next_start
            stop = self._final_below()
            if stop is None or stop == bucket_start or self._bytes_below(stop) >= self._limits.window:
                for table in self._take_below(stop):
                    yield table.select(self._schema.names)
                self._held = [run for run in self._held if run]
                if stop is None:
                    return
                if stop == bucket_start:
                    self._held.append(SortedRun(dedupe(self._buckets.load_next())))
            else:
                self._read_group()

    def _final_below(self) -> int | None:
        """Return the row below which no unread group and no spill file has a row; None if all rows are held."""
        unread = self._groups[self._next_group][0].low if self._next_group < len(self._groups) else None
        return min((row for row in (unread, self._buckets.next_start) if row is not None), default=None)

    def _bytes_below(self, stop: int | None) -> int:
        return sum(run.bytes_below(stop) for run in self._held)

    def _take_below(self, stop: int | None) -> Iterator[pa.Table]:
        """Yield the held rows below `stop`, in tables of about `window` bytes: more may have become final together."""
        window = self._limits.window
        while longest := max(self._held, key=lambda run: run.count_below(stop), default=None):
            rows = longest.count_below(stop)
            if not rows:
                return
            size = self._bytes_below(stop)
            is_large = rows > 1 and size > 2 * window
            cut = longest.row_at(max(1, rows * window // size)) if is_large else stop
            yield dedupe([run.take(cut) for run in self._held])

    def _read_group(self) -> None:
        """Read the next row group, and spill distant rows if too many are held."""
        group, number = self._groups[self._next_group]
        self._next_group += 1
        self._held.append(SortedRun(_read(self._parts[number], group, self._schema)))
        if sum(run.size for run in self._held) > self._max_held:
            self._held = [SortedRun(self._buckets.spill(dedupe([run.take() for run in self._held])))]
            self._max_held = max(self._limits.held, 2 * self._held[0].size)
            pa.default_memory_pool().release_unused()  # an allocator may keep several times the memory in use


def _read(part: Part, group: Group, schema: pa.Schema) -> pa.Table:
    try:
        table = part.read_table(group.low, group.high + 1, schema)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise BatchvlError(f"{part.path}: cannot be read: {reason}") from error
    for (name, kind), value in zip(_RANK, (part.attempt, part.retry), strict=True):
        table = table.append_column(pa.field(name, kind), pa.repeat(pa.scalar(value, kind), len(table)))
    return table.combine_chunks()


def dedupe(tables: list[pa.Table]) -> pa.Table:
    """Return the rows of sorted tables in order, each once. Copies nothing if no two tables overlap."""
    tables = sorted((table for table in tables if len(table)), key=lambda table: row_numbers(table)[0]) or tables[:1]
    ends = [(rows[0], rows[-1]) for rows in map(row_numbers, tables) if rows]
    if all(last < first for (_, last), (first, _) in pairwise(ends)):
        return pa.concat_tables(tables)
    table = pa.concat_tables(tables).combine_chunks()  # taking rows from chunks is far slower
    key = table.select(["row", "retry", "attempt"]).append_column("failed", pc.equal(table["status"], "failed"))
    order = pc.sort_indices(key, _PRECEDENCE)
    row = key["row"].combine_chunks().take(order)
    is_first = pc.not_equal(row.slice(1), row.slice(0, len(row) - 1))
    return table.take(order.filter(pa.concat_arrays([pa.array([True]), is_first])))
