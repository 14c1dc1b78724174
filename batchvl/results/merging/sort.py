"""The rows of many parts in the manifest's order, each once, in memory that does not grow with them.

Row groups are read in the order of their first rows, each once, and held until their last row's turn. Where parts
follow the manifest's order, as a run's do, few are held at a time. Where they do not (a retry of rows from all over the
manifest), those whose turn is far are dealt out into files: see `stretches.py`.
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
    """What is in memory, in bytes of decoded rows, all of them about."""

    window: int = 2 * 2**20
    """Rows that leave together."""
    held: int = 16 * 2**20
    """Rows that are held before those whose turn is far are dealt out."""
    stretch: int = 8 * 2**20
    """Rows of a file that they are dealt out into, which comes back as a whole."""


_RANK = (("attempt", pa.int32()), ("retry", pa.int32()))
_BEST = [("row", "ascending"), ("failed", "ascending"), ("retry", "descending"), ("attempt", "ascending")]


class SortedRun:
    """Rows in ascending order, handed out from the front."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._rows = row_numbers(table)
        self._at = 0
        self.size = int(table.nbytes)
        """Bytes; all of them stay in memory until the last row is out."""

    def __bool__(self) -> bool:
        return self._at < len(self._rows)

    def below(self, stop: int | None) -> int:
        """How many rows are left below a row, or at all."""
        return (len(self._rows) if stop is None else bisect_left(self._rows, stop, self._at)) - self._at

    def bytes_below(self, stop: int | None) -> int:
        """About how many bytes these have."""
        return self.size * self.below(stop) // max(1, len(self._rows))

    def after(self, rows: int) -> int:
        """The row that comes after so many of those that are left."""
        return self._rows[self._at + rows]

    def take(self, stop: int | None = None) -> pa.Table:
        """Hands out what is left below a row, or all."""
        rows = self.below(stop)
        self._at += rows
        return self._table.slice(self._at - rows, rows)


def ordered(
    parts: Sequence[Part], schema: pa.Schema, scratch: Path, limits: Limits = Limits()
) -> Iterator[pa.Table]:  # fmt: skip
    """All rows of the parts in order, each once, in tables of about `limits.window` bytes.

    Of several records of a row ok wins over failed, then the later retry, then the lower attempt. schema: the output's.
    scratch: a folder for temporary files, in all as large as the parts' rows at most.

    Raises OSError where these cannot be written, and BatchvlError where a part cannot be read or is damaged.
    """
    groups = sorted((group, n) for n, part in enumerate(parts) for group in part.groups)
    stretches = SpillBuckets([group for group, _ in groups], limits.stretch, scratch)
    held: list[SortedRun] = []
    most = limits.held
    at = 0
    while True:
        # What is held below both has nobody left to wait for.
        unread = groups[at][0].low if at < len(groups) else None
        dealt = stretches.next
        stop = min((row for row in (unread, dealt) if row is not None), default=None)
        if stop == dealt or sum(some.bytes_below(stop) for some in held) >= limits.window:
            for table in _leaving(held, stop, limits.window):
                yield table.select(schema.names)
            held = [some for some in held if some]
            if stop is None:
                return
            if stop == dealt:
                held.append(SortedRun(dedupe(stretches.load())))
        else:
            group, n = groups[at]
            at += 1
            held.append(SortedRun(_read(parts[n], group, schema)))
            if sum(some.size for some in held) > most:
                held = [SortedRun(stretches.deal(dedupe([some.take() for some in held])))]
                most = max(limits.held, 2 * held[0].size)
                pa.default_memory_pool().release_unused()  # an allocator may keep several times of what is in use


def _leaving(held: list[SortedRun], stop: int | None, window: int) -> Iterator[pa.Table]:
    """The rows below `stop`, in tables of about `window` bytes: more may have become ready at once."""
    while longest := max(held, key=lambda some: some.below(stop), default=None):
        rows = longest.below(stop)
        if not rows:
            return
        size = sum(some.bytes_below(stop) for some in held)
        many = rows > 1 and size > 2 * window
        cut = longest.after(max(1, rows * window // size)) if many else stop
        yield dedupe([some.take(cut) for some in held])


def _read(part: Part, group: Group, schema: pa.Schema) -> pa.Table:
    try:
        table = part.table(group.low, group.high + 1, schema)
    except OSError as error:
        raise BatchvlError(
            f"{part.path}: cannot be read: {os.strerror(error.errno) if error.errno else error}"
        ) from error
    for (name, kind), value in zip(_RANK, (part.attempt, part.retry), strict=True):
        table = table.append_column(pa.field(name, kind), pa.repeat(pa.scalar(value, kind), len(table)))
    return table.combine_chunks()


def dedupe(tables: list[pa.Table]) -> pa.Table:
    """The rows of sorted tables in order, each once: nothing is copied where no two tables overlap."""
    tables = sorted((table for table in tables if len(table)), key=lambda table: row_numbers(table)[0]) or tables[:1]
    ends = [(rows[0], rows[-1]) for rows in map(row_numbers, tables) if rows]
    if all(last < first for (_, last), (first, _) in pairwise(ends)):
        return pa.concat_tables(tables)
    table = pa.concat_tables(tables).combine_chunks()  # taking from chunks costs far more
    key = table.select(["row", "retry", "attempt"]).append_column("failed", pc.equal(table["status"], "failed"))
    order = pc.sort_indices(key, _BEST)
    row = key["row"].combine_chunks().take(order)
    first = pc.not_equal(row.slice(1), row.slice(0, len(row) - 1))
    return table.take(order.filter(pa.concat_arrays([pa.array([True]), first])))
