import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.output.done import Bitmap, Tally
from batchvl.output.record import Counts

rows = st.sets(st.integers(0, 300) | st.integers(5000, 5100))


@given(rows)
def test_it_is_a_set(some: set[int]) -> None:
    bitmap = Bitmap(some)
    assert {row for row in range(5200) if row in bitmap} == some
    assert list(bitmap) == sorted(some)
    assert len(bitmap) == len(some)


@given(rows, rows)
def test_union_and_difference(a: set[int], b: set[int]) -> None:
    union, difference = Bitmap(a), Bitmap(a)
    union |= Bitmap(b)
    difference -= Bitmap(b)
    assert (set(union), set(difference)) == (a | b, a - b)
    assert union == Bitmap(a | b)


@given(rows, st.integers(0, 5200), st.integers(0, 5200))
def test_missing_and_count(some: set[int], start: int, stop: int) -> None:
    wanted = range(start, stop)
    assert list(Bitmap(some).missing(wanted)) == [row for row in wanted if row not in some]
    assert Bitmap(some).count(wanted) == len(some & set(wanted))


@given(rows)
def test_text_and_back(some: set[int]) -> None:
    assert Bitmap.load(Bitmap(some).dump()) == Bitmap(some)


def test_text_of_ten_million_rows_is_small_and_quick_to_search() -> None:
    full = Bitmap.load(Bitmap(range(8)).dump())
    full._bits = bytearray(b"\xff") * 1_250_000
    assert len(full.dump()) < 5000
    assert list(full.missing(range(3, 10_000_002))) == [10_000_000, 10_000_001]


@pytest.mark.parametrize("text", ["", "0:", "x:AAAA", "0:!!", "0:AAAA"])
def test_text_that_is_no_bitmap(text: str) -> None:
    with pytest.raises(ValueError):
        Bitmap.load(text)


def test_tallies_join_by_the_order_in_which_they_win() -> None:
    first = Tally(Bitmap([1]), {"a": Bitmap([2, 3])})
    second = Tally(Bitmap([2]), {"b": Bitmap([1, 3, 4])})
    found = Tally.joined([first, second])
    assert found.counts() == Counts(2, {"a": 1, "b": 1})
    assert (list(found.ok), list(found.failed["a"]), list(found.failed["b"])) == ([1, 2], [3], [4])
    assert list(found.rows()) == [1, 2, 3, 4]
