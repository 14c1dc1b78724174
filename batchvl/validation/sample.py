"""Some rows of many: `Sample`, and how to read them again: `AllExcept`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Set


class Sample:
    """At most `size` row numbers, each of those offered as likely as any other (Vitter, Random Sampling with a
    Reservoir, 1985, algorithm R): the same ones for the same seed."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, random.Random(seed)
        self._offered = 0
        self._taken: list[int] = []

    def offer(self, number: int) -> None:
        """A row's number."""
        self._offered += 1
        if len(self._taken) < self._size:
            self._taken.append(number)
        elif (place := int(self._random.random() * self._offered)) < self._size:
            self._taken[place] = number

    def numbers(self) -> frozenset[int]:
        """Those that were taken."""
        return frozenset(self._taken)


class AllExcept:
    """Holds every row but some: what is skipped when these alone are read.

    >>> only = AllExcept({5, 3, 9})
    >>> 3 in only, 4 in only, list(only.missing(range(8)))
    (False, True, [3, 5])
    """

    def __init__(self, numbers: Set[int]) -> None:
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        return number not in self._numbers

    def missing(self, rows: range) -> Iterator[int]:
        """Those of `rows` that are to be read, in order."""
        return iter(sorted(number for number in self._numbers if number in rows))
