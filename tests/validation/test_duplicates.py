"""The external sort finds the same duplicates as a dict in memory."""

from __future__ import annotations

import errno
import os
from io import FileIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.errors import BatchvlError
from batchvl.validation.duplicates import PAIRS, DuplicateFinder, mix64

WORDS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(WORDS | st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]), max_size=300), st.integers(1, 64))
def test_it_finds_the_same_as_a_dict(values: list[int], run: int) -> None:
    with DuplicateFinder(run) as finder:
        for row, value in enumerate(values):
            finder.add(value, 10 * row)
        found = finder.finish()

    seen: set[int] = set()
    repeats = [10 * row for row, value in enumerate(values) if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
    assert (found.distinct, found.repeated) == (len(set(values)), len(repeats))
    assert [row for row, _ in found.pairs] == repeats
    assert all(earlier < row and values[earlier // 10] == values[row // 10] for row, earlier in found.pairs)


def test_only_the_first_of_many_duplicates_are_returned() -> None:
    """All of them are in one range."""
    with DuplicateFinder(run=1000) as finder:
        for row in range(20_000):
            finder.add(row % 7, row)
        found = finder.finish()
    assert (found.distinct, found.repeated, len(found.pairs)) == (7, 19_993, PAIRS)
    assert [row for row, _ in found.pairs] == list(range(7, 7 + PAIRS))


@given(st.lists(WORDS, unique=True), st.integers(1, 2**20))
def test_mixed_integers_stay_different_and_are_far_apart(values: list[int], step: int) -> None:
    assert len({mix64(value) for value in values}) == len(values)
    assert all(-(2**63) <= mix64(value) < 2**63 for value in values)
    halves = [mix64(step * number) > 0 for number in range(1000)]
    assert 300 < sum(halves) < 700


def test_a_full_disk_is_reported() -> None:
    full = FileIO("/dev/full", "w")
    with DuplicateFinder(run=10, file=full) as finder:
        for row in range(9):
            finder.add(row, row)
        with pytest.raises(BatchvlError, match=os.strerror(errno.ENOSPC) + ".*TMPDIR"):
            finder.add(9, 9)
