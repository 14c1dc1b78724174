"""Medians of many numbers without keeping them."""

from __future__ import annotations

from statistics import median_low

from hypothesis import given
from hypothesis import strategies as st

from batchvl.validation.quantiles import Histogram


@given(st.lists(st.integers(0, 2**50), min_size=1))
def test_it_is_the_spread(numbers: list[int]) -> None:
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    found = histogram.spread()
    assert found is not None
    assert (found.least, found.greatest) == (min(numbers), max(numbers))
    wanted = median_low(numbers)
    assert wanted * (1 - 1 / 1024) <= found.median <= wanted


def test_of_nothing_there_is_none() -> None:
    assert Histogram().spread() is None
