"""Files for rows that are output much later, each for a range of the manifest's rows.

This is the distribution pass of an external bucket sort (Knuth, The Art of Computer Programming 3, 5.2.5 and 5.4.9):
every row is written and read once more, however the rows are spread, while a merge of sorted runs takes as many passes
as there are levels of runs.
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
    """Files of rows, one for each range of rows (bucket), each loaded when the output reaches its range.

    The ranges are chosen as if the bytes of a row group were spread evenly between its first and its last row.
    """

    def __init__(self, groups: Sequence[Group], size: int, directory: Path) -> None:
        """Create no file yet.

        Args:
            groups: All row groups of all parts.
            size: Approximate bytes of a bucket's rows.
            directory: Where the files are written.
        """
        self._groups, self._size, self._directory = groups, size, directory
        self._starts: Sequence[int] = ()  # first row of each bucket, determined by the first spill
        self._filled: list[int] = []  # a heap of the numbers of the buckets that have a file

    @property
    def next_start(self) -> int | None:
        """First row of the first bucket that has a file; None if there is none."""
        return self._starts[self._filled[0]] if self._filled else None

    def spill(self, table: pa.Table) -> pa.Table:
        """Write the rows of later buckets to their files and return those of the first row's own bucket.

        Args:
            table: Rows in ascending order. The first row's bucket must not have a file.

        Raises:
            OSError: a file cannot be written.
        """
        if not self._starts:
            self._starts = array("q", bucket_starts(self._groups, self._size))
        rows = row_numbers(table)
        number = bisect_right(self._starts, rows[0])
        near = at = self._end(rows, number, 0)
        while at < len(rows):
            number = bisect_right(self._starts, rows[at], number)
            stop = self._end(rows, number, at)
            self._append(number - 1, table.slice(at, stop - at))
            at = stop
        return table.take(pa.array(range(near)))  # a slice would keep the whole table in memory

    def _end(self, rows: Sequence[int], number: int, at: int) -> int:
        """Return the index of the first row that belongs to the bucket `number` or a later one."""
        return bisect_left(rows, self._starts[number], at) if number < len(self._starts) else len(rows)

    def _append(self, number: int, table: pa.Table) -> None:
        path = self._path(number)
        if not path.exists():
            heapq.heappush(self._filled, number)
        options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
        with open(path, "ab") as file, pa.ipc.new_stream(file, table.schema, options=options) as writer:
            writer.write_table(table)

    def load_next(self) -> list[pa.Table]:
        """Return the rows of the first bucket as tables in ascending order, and remove its file. Raises OSError."""
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
        return self._directory / f"bucket-{number}.arrow"


def row_numbers(table: pa.Table) -> Sequence[int]:
    """Return the column `row`, which has no nulls, for bisection; without a copy if it has one chunk."""
    chunks = table["row"].chunks
    row = chunks[0] if len(chunks) == 1 else pa.concat_arrays([pa.array([], pa.int64()), *chunks])
    return memoryview(row.buffers()[1]).cast("q")[row.offset : row.offset + len(row)] if len(row) else array("q")


def bucket_starts(groups: Iterable[Group], size: int) -> Iterator[int]:
    """Yield the first rows of buckets of about `size` bytes, from row 0 on.

    >>> list(bucket_starts([Group(0, 9, 100), Group(0, 4, 100)], 60))
    [0, 2, 4, 8]
    """
    changes = []
    for low, high, length in groups:
        density = length / (high + 1 - low)
        changes += [(low, density), (high + 1, -density)]
    row, filled, density = 0, 0.0, 0.0
    yield row
    for stop, change in sorted(changes):
        while density > 0 and filled + density * (stop - row) >= size:
            row += max(1, round((size - filled) / density))
            filled = 0.0
            yield row
        filled += density * (stop - row)
        row, density = stop, density + change
