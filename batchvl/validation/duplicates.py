"""What is there more than once among millions, in memory that does not grow with them: `Digests`."""

from __future__ import annotations

import heapq
import os
import tempfile
from array import array
from bisect import bisect_left
from types import TracebackType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import BatchvlError

RUN = 2**19
"""Digests that are sorted in memory at once: 8 MB with their rows."""
RANGES = 256
PAIRS = 1000

_WORD = 8
_LEAST = -(2**63)
_STEP = 2**64 // RANGES


class Counted(NamedTuple):
    """How many different digests there are, how many stand for one that was there before, and which rows those are."""

    distinct: int
    repeated: int
    pairs: list[tuple[int, int]]
    """The first PAIRS rows, in order, that repeat another one: each with an earlier row that it repeats."""


class Digests:
    """64-bit digests of rows, of which those that are there twice are found by an external sort; a context manager.

    Sorted runs go to a temporary file without a name, in TMPDIR, each without what it has twice; then the runs are
    read side by side, one of RANGES ranges of digests after the other, and sorted together (distribution of sorted
    runs; Knuth, The Art of Computer Programming, volume 3, 5.4). In memory are a run and what sorting it takes, 40 MB;
    then a 1/RANGES of what differs, 1 MB of 10 million. On disk each takes 16 bytes at most.

    Of n different values two have the same digest with a probability of about n²/2⁶⁵, 1 in 370,000 for 10 million, if
    the digests are well mixed. Raises BatchvlError where the disk is full.

    >>> with Digests() as digests:
    ...     for row, value in enumerate([7, -3, 7, 7, 5]):
    ...         digests.add(value, row)
    ...     digests.count()
    Counted(distinct=3, repeated=2, pairs=[(2, 0), (3, 2)])
    """

    def __init__(self, run: int = RUN) -> None:
        self._run = run
        self._added = 0
        self._digests, self._rows = array("q"), array("q")
        self._places: list[tuple[int, int, list[int]]] = []
        """Of each run: where it begins in the file, its length, and where each range begins in it."""
        self._pairs: list[tuple[int, int]] = []
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115

    def __enter__(self) -> Digests:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, digest: int, row: int) -> None:
        """A row's digest, a signed integer of 64 bits; rows come in ascending order."""
        self._digests.append(digest)
        self._rows.append(row)
        if len(self._digests) == self._run:
            self._end_run()

    def count(self) -> Counted:
        """Once, after the last one was added."""
        self._end_run()
        distinct = 0
        for at in range(RANGES):
            digests, rows = self._range(at)
            distinct += len(self._unique(digests, rows)[0])
        return Counted(distinct, self._added - distinct, self._pairs)

    def _end_run(self) -> None:
        self._added += len(self._digests)
        digests, rows = self._unique(_words(self._digests), _words(self._rows))
        self._digests, self._rows = array("q"), array("q")
        view = memoryview(digests.buffers()[1]).cast("q")
        bounds = [bisect_left(view, _LEAST + at * _STEP) for at in range(RANGES)]
        self._places.append((self._write(digests, rows), len(digests), [*bounds, len(digests)]))

    def _unique(self, digests: pa.Array, rows: pa.Array) -> tuple[pa.Array, pa.Array]:
        """Sorted and each once, with its first row; what comes again leaves its rows among the pairs."""
        if len(digests) < 2:
            return digests, rows
        order = pc.sort_indices(digests)  # stable: rows stay in order
        digests, rows = digests.take(order), rows.take(order)
        again = pc.equal(digests[1:], digests[:-1])
        if not pc.any(again).as_py():
            return digests, rows
        later, earlier = rows[1:].filter(again), rows[:-1].filter(again)
        first = pc.sort_indices(later)[:PAIRS]
        found = zip(later.take(first).to_pylist(), earlier.take(first).to_pylist(), strict=True)
        self._pairs = heapq.nsmallest(PAIRS, [*self._pairs, *found])
        new = pa.concat_arrays([pa.array([True]), pc.invert(again)])
        return digests.filter(new), rows.filter(new)

    def _write(self, *columns: pa.Array) -> int:
        begin = self._file.tell()
        try:
            for column in columns:
                data = memoryview(column.buffers()[1])[: len(column) * _WORD]
                while data:
                    data = data[self._file.write(data) :]
        except OSError as error:
            folder = tempfile.gettempdir()
            raise BatchvlError(
                f"{folder}: no room to look for what is there twice, 64 bytes a row: {error.strerror}; "
                "the variable TMPDIR names another folder"
            ) from None
        return begin

    def _range(self, at: int) -> tuple[pa.Array, pa.Array]:
        """The digests of a range in all runs, and their rows."""
        digests, rows = [], []
        for begin, length, bounds in self._places:
            start, stop = bounds[at], bounds[at + 1]
            if start < stop:
                digests.append(self._read(begin + start * _WORD, stop - start))
                rows.append(self._read(begin + (length + start) * _WORD, stop - start))
        if not digests:
            return pa.array([], pa.int64()), pa.array([], pa.int64())
        return pa.concat_arrays(digests), pa.concat_arrays(rows)

    def _read(self, offset: int, words: int) -> pa.Array:
        return _words(os.pread(self._file.fileno(), words * _WORD, offset))


def _words(data: array[int] | bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(memoryview(data).cast("B")) // _WORD, [None, pa.py_buffer(data)])


def mix64(number: int) -> int:
    """An integer of 64 bits as a digest that no other one has (Fibonacci hashing): numbers in a row lie far apart.

    >>> mix64(1) != mix64(2)
    True
    """
    product = number * 0x9E3779B97F4A7C15 & (2**64 - 1)
    return product - 2**64 if product >> 63 else product
