"""Rows whose turn is far, dealt out into files that each have a stretch of the manifest's rows: `SpillBuckets`.

The distribution pass of an external bucket sort (Knuth, The Art of Computer Programming 3, 5.2.5 and 5.4.9): every row
is written and read once more, however the rows lie, where a merge of sorted runs takes as many passes as there are
levels of runs.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa

from ..parts import Group


class SpillBuckets:
    """Files of rows, each read once its stretch begins.

    groups: all row groups there are. size: bytes of a stretch's rows, about. Where one stretch ends and the next begins
    is reckoned as if a group's bytes were spread evenly over the rows from its first to its last.
    """

    def __init__(self, groups: Sequence[Group], size: int, folder: Path) -> None:
        self._groups, self._size, self._folder = groups, size, folder
        self._starts: Sequence[int] | None = None
        self._filled: list[int] = []  # a heap of the numbers of those that have a file

    @property
    def next(self) -> int | None:
        """Where the first stretch with rows begins; None where there is none."""
        return self._starts[self._filled[0]] if self._starts is not None and self._filled else None

    def deal(self, table: pa.Table) -> pa.Table:
        """Puts the rows of later stretches into their files, and gives back those of the first row's own.

        table: rows in ascending order, the first one's stretch neither dealt out nor loaded any more. Raises OSError.
        """
        if self._starts is None:
            self._starts = array("q", stretches(self._groups, self._size))
        rows = row_numbers(table)
        number = bisect_right(self._starts, rows[0])
        near = at = self._end(rows, number, 0)
        while at < len(rows):
            number = bisect_right(self._starts, rows[at], number)
            stop = self._end(rows, number, at)
            self._put(number - 1, table.slice(at, stop - at))
            at = stop
        return table.take(pa.array(range(near)))  # a slice would keep the whole of it in memory

    def _end(self, rows: Sequence[int], number: int, at: int) -> int:
        assert self._starts is not None
        return bisect_left(rows, self._starts[number], at) if number < len(self._starts) else len(rows)

    def _put(self, number: int, table: pa.Table) -> None:
        path = self._path(number)
        if not path.exists():
            heapq.heappush(self._filled, number)
        options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        with open(path, "ab") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)

    def load(self) -> list[pa.Table]:
        """The first stretch's rows, as tables in ascending order, and removes its file. Raises OSError."""
        path = self._path(heapq.heappop(self._filled))
        tables = []
        size = path.stat().st_size
        with pa.OSFile(str(path)) as file:
            while file.tell() < size:
                with pa.ipc.open_stream(file, options=pa.ipc.IpcReadOptions(use_threads=False)) as reader:
                    tables.append(reader.read_all())
        path.unlink()
        return tables

    def _path(self, number: int) -> Path:
        return self._folder / f"stretch-{number}.arrow"


def row_numbers(table: pa.Table) -> Sequence[int]:
    """The column `row`, which has no nulls, for bisecting; no copy where it is of one chunk."""
    chunks = table["row"].chunks
    row = chunks[0] if len(chunks) == 1 else pa.concat_arrays([pa.array([], pa.int64()), *chunks])
    return memoryview(row.buffers()[1]).cast("q")[row.offset : row.offset + len(row)] if len(row) else array("q")


def stretches(groups: Iterable[Group], size: int) -> Iterator[int]:
    """The rows that stretches of about `size` bytes begin with, from row 0 on.

    >>> list(stretches([Group(0, 9, 100), Group(0, 4, 100)], 60))
    [0, 2, 4, 8]
    """
    changes = []
    for low, high, length in groups:
        density = length / (high + 1 - low)
        changes += [(low, density), (high + 1, -density)]
    row, held, density = 0, 0.0, 0.0
    yield row
    for stop, change in sorted(changes):
        while density > 0 and held + density * (stop - row) >= size:
            row += max(1, round((size - held) / density))
            held = 0.0
            yield row
        held += density * (stop - row)
        row, density = stop, density + change
