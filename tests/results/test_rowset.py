import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.results.record import Counts
from batchvl.results.rowset import Outcomes, RowSet

rows = st.sets(st.integers(0, 300) | st.integers(5000, 5100))


@given(rows)
def test_a_row_set_is_a_set(numbers: set[int]) -> None:
    row_set = RowSet(numbers)
    assert {row for row in range(5200) if row in row_set} == numbers
    assert list(row_set) == sorted(numbers)
    assert len(row_set) == len(numbers)


@given(rows, rows)
def test_union_and_difference(a: set[int], b: set[int]) -> None:
    union, difference = RowSet(a), RowSet(a)
    union |= RowSet(b)
    difference -= RowSet(b)
    assert (set(union), set(difference)) == (a | b, a - b)
    assert union == RowSet(a | b)


@given(rows, st.integers(0, 5200), st.integers(0, 5200))
def test_missing_and_count(numbers: set[int], start: int, stop: int) -> None:
    interval = range(start, stop)
    assert list(RowSet(numbers).missing(interval)) == [row for row in interval if row not in numbers]
    assert RowSet(numbers).count(interval) == len(numbers & set(interval))


@given(rows)
def test_a_row_set_survives_a_round_trip(numbers: set[int]) -> None:
    assert RowSet.load(RowSet(numbers).dump()) == RowSet(numbers)


def test_ten_million_rows_are_short_as_text() -> None:
    full = RowSet.below(10_000_000)
    assert len(full.dump()) < 5000
    assert list(full.missing(range(3, 10_000_002))) == [10_000_000, 10_000_001]


@pytest.mark.parametrize("text", ["", "0:", "x:AAAA", "0:!!", "0:AAAA"])
def test_invalid_text(text: str) -> None:
    with pytest.raises(ValueError):
        RowSet.load(text)


@given(rows, rows)
def test_rows_are_added_together_or_one_by_one(a: set[int], b: set[int]) -> None:
    together, one_by_one = RowSet(a), RowSet(a)
    together.update(row for row in b)
    for row in b:
        one_by_one.add(row)
    assert together == one_by_one == RowSet(a | b)


@given(st.lists(st.dictionaries(st.integers(0, 60), st.sampled_from([None, "a", "b", "c"]), max_size=20), max_size=6))
def test_joined_outcomes_have_each_row_once_by_precedence(attempts: list[dict[int, str | None]]) -> None:
    best: dict[int, str | None] = {}
    for results in attempts:
        for row, code in results.items():
            if row not in best or code is None:
                best[row] = code
    joined = Outcomes.joined([Outcomes.of(results.items()) for results in attempts])
    assert set(joined.ok) == {row for row, code in best.items() if code is None}
    assert {code: set(rows) for code, rows in joined.failed.items() if len(rows)} == {
        code: {row for row in best if best[row] == code} for code in set(best.values()) if code is not None
    }
    assert set(joined.rows()) == set(best)


def test_joining_a_thousand_outcomes_touches_only_the_rows_of_each() -> None:
    items = []
    for start in range(0, 10_000_000, 10_000):
        ok = RowSet(range(start, start + 10_000))
        failed = {code: RowSet(range(start + at, start + 9_999, 100)) for at, code in enumerate("abc")}
        items.append(Outcomes(ok, failed))
    begin = time.process_time()
    joined = Outcomes.joined(items)
    assert time.process_time() - begin < 2, "it took 8 s when each step copied the whole set"
    assert joined.counts().rows == len(joined.rows()) > 9_000_000


def test_missing_rows_in_a_short_range_are_found_without_a_scan_of_the_set() -> None:
    full = RowSet.below(10_000_000)
    begin = time.process_time()
    assert not any(True for start in range(0, 10_000_000, 1000) for _ in full.missing(range(start, start + 256)))
    assert time.process_time() - begin < 2, "ten thousand scans of a megabyte take longer"


def test_outcomes_are_joined_in_order_of_precedence() -> None:
    first = Outcomes(RowSet([1]), {"a": RowSet([2, 3])})
    second = Outcomes(RowSet([2]), {"b": RowSet([1, 3, 4])})
    joined = Outcomes.joined([first, second])
    assert joined.counts() == Counts(2, {"a": 1, "b": 1})
    assert (list(joined.ok), list(joined.failed["a"]), list(joined.failed["b"])) == ([1, 2], [3], [4])
    assert list(joined.rows()) == [1, 2, 3, 4]
