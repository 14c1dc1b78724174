"""The distribution of a number over many rows."""

from __future__ import annotations

import math
from collections import Counter

import msgspec

_BITS = 11
"""Leading bits of a number that are kept: medians are exact to 1 in 1,024."""


class Quantiles(msgspec.Struct, frozen=True):
    """The minimum, median and maximum of some whole numbers. The median is exact to 0.1 %."""

    least: int
    median: int
    greatest: int


class Histogram:
    """Count numbers by their leading bits, so that memory does not grow: at most 55,000 counters.

    >>> histogram = Histogram()
    >>> for number in (5, 1, 3, 1000000):
    ...     histogram.add(number)
    >>> histogram.quantiles()
    Quantiles(least=1, median=3, greatest=1000000)
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._least: float = math.inf
        self._greatest = 0

    def add(self, number: int) -> None:
        """Count a whole number, 0 or more."""
        if number < self._least:
            self._least = number
        if number > self._greatest:
            self._greatest = number
        shift = number.bit_length() - _BITS
        self._counts[number if shift <= 0 else number >> shift << shift] += 1

    def quantiles(self) -> Quantiles | None:
        """Return the quantiles; None if nothing was added. Of an even count, the median is the lower middle number."""
        half = -(-self._counts.total() // 2)
        for number in sorted(self._counts):
            half -= self._counts[number]
            if half <= 0:
                return Quantiles(int(self._least), max(number, int(self._least)), self._greatest)
        return None
