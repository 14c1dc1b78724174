import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.results.record import Counts
from batchvl.results.rowset import Outcomes, RowSet

rows = st.sets(st.integers(0, 300) | st.integers(5000, 5100))


@given(rows)
def test_it_is_a_set(some: set[int]) -> None:
    bitmap = RowSet(some)
    assert {row for row in range(5200) if row in bitmap} == some
    assert list(bitmap) == sorted(some)
    assert len(bitmap) == len(some)


@given(rows, rows)
def test_union_and_difference(a: set[int], b: set[int]) -> None:
    union, difference = RowSet(a), RowSet(a)
    union |= RowSet(b)
    difference -= RowSet(b)
    assert (set(union), set(difference)) == (a | b, a - b)
    assert union == RowSet(a | b)


@given(rows, st.integers(0, 5200), st.integers(0, 5200))
def test_missing_and_count(some: set[int], start: int, stop: int) -> None:
    wanted = range(start, stop)
    assert list(RowSet(some).missing(wanted)) == [row for row in wanted if row not in some]
    assert RowSet(some).count(wanted) == len(some & set(wanted))


@given(rows)
def test_text_and_back(some: set[int]) -> None:
    assert RowSet.load(RowSet(some).dump()) == RowSet(some)


def test_text_of_ten_million_rows_is_small_and_quick_to_search() -> None:
    full = RowSet.load(RowSet(range(8)).dump())
    full._bits = bytearray(b"\xff") * 1_250_000
    assert len(full.dump()) < 5000
    assert list(full.missing(range(3, 10_000_002))) == [10_000_000, 10_000_001]


@pytest.mark.parametrize("text", ["", "0:", "x:AAAA", "0:!!", "0:AAAA"])
def test_text_that_is_no_bitmap(text: str) -> None:
    with pytest.raises(ValueError):
        RowSet.load(text)


@given(rows, rows)
def test_rows_are_taken_in_at_once_or_one_by_one(a: set[int], b: set[int]) -> None:
    at_once, one_by_one = RowSet(a), RowSet(a)
    at_once.update(row for row in b)
    for row in b:
        one_by_one.add(row)
    assert at_once == one_by_one == RowSet(a | b)


@given(st.lists(st.dictionaries(st.integers(0, 60), st.sampled_from([None, "a", "b", "c"]), max_size=20), max_size=6))
def test_joined_tallies_have_each_row_once_with_the_result_that_wins(given: list[dict[int, str | None]]) -> None:
    best: dict[int, str | None] = {}
    for results in given:
        for row, code in results.items():
            if row not in best or code is None:
                best[row] = code
    found = Outcomes.joined([Outcomes.of(results.items()) for results in given])
    assert set(found.ok) == {row for row, code in best.items() if code is None}
    assert {code: set(rows) for code, rows in found.failed.items() if len(rows)} == {
        code: {row for row in best if best[row] == code} for code in set(best.values()) if code is not None
    }
    assert set(found.rows()) == set(best)


def test_a_thousand_tallies_of_ten_million_rows_join_without_going_through_all_of_them_each_time() -> None:
    tallies = []
    for start in range(0, 10_000_000, 10_000):
        ok = RowSet([start, start + 9_999])
        ok._bits[1:-1] = b"\xff" * (len(ok._bits) - 2)
        tallies.append(
            Outcomes(ok, {code: RowSet(range(start + at, start + 9_999, 100)) for at, code in enumerate("abc")})
        )
    begin = time.process_time()
    found = Outcomes.joined(tallies)
    assert time.process_time() - begin < 2, "it took 8 s when each step copied the whole"
    assert found.counts().rows == len(found.rows()) > 9_000_000


def test_what_is_missing_near_by_is_found_without_a_look_at_the_rest() -> None:
    full = RowSet.below(10_000_000)
    begin = time.process_time()
    assert not any(True for start in range(0, 10_000_000, 1000) for _ in full.missing(range(start, start + 256)))
    assert time.process_time() - begin < 2, "ten thousand looks at a megabyte each take longer"


def test_tallies_join_by_the_order_in_which_they_win() -> None:
    first = Outcomes(RowSet([1]), {"a": RowSet([2, 3])})
    second = Outcomes(RowSet([2]), {"b": RowSet([1, 3, 4])})
    found = Outcomes.joined([first, second])
    assert found.counts() == Counts(2, {"a": 1, "b": 1})
    assert (list(found.ok), list(found.failed["a"]), list(found.failed["b"])) == ([1, 2], [3], [4])
    assert list(found.rows()) == [1, 2, 3, 4]
