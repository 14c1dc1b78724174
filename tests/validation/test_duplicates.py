"""What is there more than once, found by an external sort: the same as with a dict in memory."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.errors import BatchvlError
from batchvl.validation.duplicates import PAIRS, Digests, mix64

WORDS = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(WORDS | st.integers(-3, 3) | st.sampled_from([-(2**63), 2**63 - 1]), max_size=300), st.integers(1, 64))
def test_it_finds_what_a_dict_finds(values: list[int], run: int) -> None:
    with Digests(run) as digests:
        for row, value in enumerate(values):
            digests.add(value, 10 * row)
        found = digests.count()

    seen: set[int] = set()
    again = [10 * row for row, value in enumerate(values) if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
    assert (found.distinct, found.repeated) == (len(set(values)), len(again))
    assert [row for row, _ in found.pairs] == again
    assert all(earlier < row and values[earlier // 10] == values[row // 10] for row, earlier in found.pairs)


def test_of_many_that_are_the_same_the_first_are_told() -> None:
    """Also where they would all lie in one range."""
    with Digests(run=1000) as digests:
        for row in range(20_000):
            digests.add(row % 7, row)
        found = digests.count()
    assert (found.distinct, found.repeated, len(found.pairs)) == (7, 19_993, PAIRS)
    assert [row for row, _ in found.pairs] == list(range(7, 7 + PAIRS))


@given(st.lists(WORDS, unique=True), st.integers(1, 2**20))
def test_mixed_integers_stay_different_and_lie_apart(values: list[int], step: int) -> None:
    assert len({mix64(value) for value in values}) == len(values)
    assert all(-(2**63) <= mix64(value) < 2**63 for value in values)
    halves = [mix64(step * number) > 0 for number in range(1000)]
    assert 300 < sum(halves) < 700


def test_a_full_disk_is_told() -> None:
    with Digests(run=10) as digests, open("/dev/full", "wb", buffering=0) as full:
        digests._file.close()
        digests._file = full
        for row in range(9):
            digests.add(row, row)
        with pytest.raises(BatchvlError, match=os.strerror(errno.ENOSPC) + ".*TMPDIR"):
            digests.add(9, 9)
