"""Find duplicates among millions of values, in memory that does not grow with them."""

from __future__ import annotations

import heapq
import os
import tempfile
from array import array
from bisect import bisect_left
from io import FileIO
from types import TracebackType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BatchvlError

RUN = 2**19
"""Digests that are sorted in memory together: 8 MB with their rows."""
RANGES = 256
PAIRS = 1000

_WORD = 8
_MIN_DIGEST = -(2**63)
_RANGE_SIZE = 2**64 // RANGES


class Duplicates(NamedTuple):
    """The result of a search for duplicates."""

    distinct: int
    """Different digests."""
    repeated: int
    """Digests that had been added before."""
    pairs: list[tuple[int, int]]
    """The first PAIRS rows that repeat another one, in order, each with an earlier row that it repeats."""


class _Run(NamedTuple):
    """A sorted run in the file: its digests, then their rows."""

    begin: int
    """Bytes from the file's start."""
    length: int
    """Digests."""
    bounds: list[int]
    """Where each range begins among the digests, and where the last one ends."""


class DuplicateFinder:
    """Find rows whose 64-bit digests are equal, by an external sort. A context manager.

    Sorted runs go to an unnamed temporary file in TMPDIR, each without repetitions. Then one of RANGES ranges of
    digests after another is read from all runs and sorted (distribution of sorted runs; Knuth, The Art of Computer
    Programming, volume 3, 5.4). Memory holds one run and what it takes to sort it, 40 MB; then 1/RANGES of the distinct
    digests, 1 MB of 10 million. A digest takes at most 16 bytes on disk.

    If digests are well mixed, two of n different values have the same one with a probability of about n²/2⁶⁵: 1 in
    370,000 for 10 million values.

    >>> with DuplicateFinder() as finder:
    ...     for row, value in enumerate([7, -3, 7, 7, 5]):
    ...         finder.add(value, row)
    ...     finder.finish()
    Duplicates(distinct=3, repeated=2, pairs=[(2, 0), (3, 2)])

    Args:
        run: Digests per sorted run.
        file: Where runs are written, an unbuffered file; by default a temporary file.
    """

    def __init__(self, run: int = RUN, file: FileIO | None = None) -> None:
        self._run_size = run
        self._added = 0
        self._digests, self._rows = array("q"), array("q")
        self._runs: list[_Run] = []
        self._pairs: list[tuple[int, int]] = []
        self._file = file if file is not None else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def __enter__(self) -> DuplicateFinder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, digest: int, row: int) -> None:
        """Add a row's digest, a signed 64-bit integer. Rows come in ascending order.

        Raises:
            BatchvlError: The disk is full.
        """
        self._digests.append(digest)
        self._rows.append(row)
        if len(self._digests) == self._run_size:
            self._end_run()

    def finish(self) -> Duplicates:
        """Return the duplicates among all digests. Call it once, after the last `add`.

        Raises:
            BatchvlError: The disk is full.
        """
        self._end_run()
        distinct = 0
        for number in range(RANGES):
            digests, rows = self._read_range(number)
            distinct += len(self._deduplicate(digests, rows)[0])
        return Duplicates(distinct, self._added - distinct, self._pairs)

    def _end_run(self) -> None:
        self._added += len(self._digests)
        digests, rows = self._deduplicate(_words(self._digests), _words(self._rows))
        self._digests, self._rows = array("q"), array("q")
        view = memoryview(digests.buffers()[1]).cast("q")
        bounds = [bisect_left(view, _MIN_DIGEST + number * _RANGE_SIZE) for number in range(RANGES)]
        self._runs.append(_Run(self._write(digests, rows), len(digests), [*bounds, len(digests)]))

    def _deduplicate(self, digests: pa.Array, rows: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Sort the digests and keep each once, with its first row. Rows of the others are added to the pairs."""
        if len(digests) < 2:
            return digests, rows
        order = pc.sort_indices(digests)  # stable: rows stay in order
        digests, rows = digests.take(order), rows.take(order)
        repeats = pc.equal(digests[1:], digests[:-1])
        if not pc.any(repeats).as_py():
            return digests, rows
        later, earlier = rows[1:].filter(repeats), rows[:-1].filter(repeats)
        first = pc.sort_indices(later)[:PAIRS]
        pairs = zip(later.take(first).to_pylist(), earlier.take(first).to_pylist(), strict=True)
        self._pairs = heapq.nsmallest(PAIRS, [*self._pairs, *pairs])
        kept = pa.concat_arrays([pa.array([True]), pc.invert(repeats)])
        return digests.filter(kept), rows.filter(kept)

    def _write(self, *columns: pa.Array) -> int:
        """Append columns to the file and return where they begin."""
        begin = self._file.tell()
        try:
            for column in columns:
                data = memoryview(column.buffers()[1])[: len(column) * _WORD]
                while data:
                    data = data[self._file.write(data) :]
        except OSError as error:
            raise BatchvlError(
                f"{tempfile.gettempdir()}: cannot write temporary files of up to 64 bytes per row, which finding "
                f"duplicates takes: {error.strerror}; set TMPDIR to another directory"
            ) from None
        return begin

    def _read_range(self, number: int) -> tuple[pa.Array, pa.Array]:
        """Return the digests of a range from all runs, and their rows."""
        digests, rows = [], []
        for run in self._runs:
            start, stop = run.bounds[number], run.bounds[number + 1]
            if start < stop:
                digests.append(self._read(run.begin + start * _WORD, stop - start))
                rows.append(self._read(run.begin + (run.length + start) * _WORD, stop - start))
        if not digests:
            return pa.array([], pa.int64()), pa.array([], pa.int64())
        return pa.concat_arrays(digests), pa.concat_arrays(rows)

    def _read(self, offset: int, words: int) -> pa.Array:
        return _words(os.pread(self._file.fileno(), words * _WORD, offset))


def _words(data: array[int] | bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(memoryview(data).cast("B")) // _WORD, [None, pa.py_buffer(data)])


def mix64(number: int) -> int:
    """Return a 64-bit integer's digest (Fibonacci hashing).

    Different integers have different digests, and those of consecutive integers are far apart.

    >>> mix64(1) != mix64(2)
    True
    """
    product = number * 0x9E3779B97F4A7C15 & (2**64 - 1)
    return product - 2**64 if product >> 63 else product
