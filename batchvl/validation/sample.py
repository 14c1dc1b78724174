"""A random sample of rows, and how to read them again."""

from __future__ import annotations

import random
from collections.abc import Iterator, Set


class Sample:
    """Choose at most `size` row numbers, each of those offered with the same probability.

    The same seed chooses the same rows (Vitter, Random Sampling with a Reservoir, 1985, algorithm R).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._random = size, random.Random(seed)
        self._offered = 0
        self._chosen: list[int] = []

    def offer(self, number: int) -> None:
        """Offer a row's number."""
        self._offered += 1
        if len(self._chosen) < self._size:
            self._chosen.append(number)
        elif (at := int(self._random.random() * self._offered)) < self._size:
            self._chosen[at] = number

    def numbers(self) -> frozenset[int]:
        """Return the numbers chosen so far."""
        return frozenset(self._chosen)


class AllExcept:
    """A set of all rows but some: the rows to skip so that only these are read.

    >>> skip = AllExcept({5, 3, 9})
    >>> 3 in skip, 4 in skip, list(skip.missing(range(8)))
    (False, True, [3, 5])
    """

    def __init__(self, numbers: Set[int]) -> None:
        self._numbers = numbers

    def __contains__(self, number: object) -> bool:
        return number not in self._numbers

    def missing(self, rows: range) -> Iterator[int]:
        """Yield the rows of `rows` that are not in the set, in order."""
        return iter(sorted(number for number in self._numbers if number in rows))
