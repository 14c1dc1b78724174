"""Quantiles of many numbers without keeping them."""

from __future__ import annotations

from statistics import median_low

from hypothesis import given
from hypothesis import strategies as st

from batchvl.validation.quantiles import Histogram


@given(st.lists(st.integers(0, 2**50), min_size=1))
def test_quantiles_of_any_numbers(numbers: list[int]) -> None:
    histogram = Histogram()
    for number in numbers:
        histogram.add(number)
    quantiles = histogram.quantiles()
    assert quantiles is not None
    assert (quantiles.least, quantiles.greatest) == (min(numbers), max(numbers))
    median = median_low(numbers)
    assert median * (1 - 1 / 1024) <= quantiles.median <= median


def test_quantiles_of_nothing() -> None:
    assert Histogram().quantiles() is None
