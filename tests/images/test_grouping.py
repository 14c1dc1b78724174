"""Rows that share their pictures are brought together, within bounds, and none is lost or doubled."""

import random

import pytest

from batchvl.images import grouping as window
from batchvl.images.grouping import MAX_GROUP_SIZE, group_by_images
from batchvl.types import Failure, FileImage, InlineImage, Row, WebImage


def row(number, *names, failure=None):
    return Row(number, images=tuple(WebImage(name) for name in names), failure=failure)


async def groups(rows, size):
    async def given():
        for each in rows:
            yield each

    return [[each.number for each in group] async for group in group_by_images(given(), size)]


async def test_rows_with_the_same_pictures_go_together_in_the_order_of_the_first():
    rows = [row(0, "a"), row(1, "b"), row(2, "a"), row(3, "c"), row(4, "b"), row(5, "a")]

    assert await groups(rows, 100) == [[0, 2, 5], [1, 4], [3]]


async def test_only_those_within_the_window_do():
    rows = [row(number, "a" if number in (0, 3, 9) else f"{number}") for number in range(12)]

    found = await groups(rows, 5)

    assert found == [[0, 3], *([number] for number in range(1, 12) if number != 3)]


async def test_where_few_rows_are_left_the_first_does_not_wait_for_as_many():
    taken = []

    async def left():
        for number in range(5, 100_000, 10_000):
            taken.append(number)
            yield row(number, "a")

    assert [len(taken) async for _ in group_by_images(left(), 4096)] == [*range(2, 11), 10]


@pytest.mark.parametrize("size", [0, 1])
async def test_without_a_window_rows_stay_as_they_come(size):
    assert await groups([row(0, "a"), row(1, "a")], size) == [[0], [1]]


async def test_the_same_means_all_of_them_in_the_same_order():
    rows = [row(0, "a", "b"), row(1, "b", "a"), row(2, "a"), row(3, "a", "b"), row(4, "a", "a")]

    assert await groups(rows, 100) == [[0, 3], [1], [2], [4]]


async def test_rows_without_pictures_or_that_cannot_be_read_are_alone():
    bad = Failure("bad", "manifest", "no", retryable=False)

    assert await groups([row(0), row(1), row(2, "a", failure=bad), row(3, "a", failure=bad)], 100) == [
        [0], [1], [2], [3],
    ]  # fmt: skip


async def test_pictures_in_the_manifest_are_the_same_by_their_bytes():
    rows = [
        Row(0, images=(InlineImage(b"picture", "image"),)),
        Row(1, images=(InlineImage(b"another", "image"),)),
        Row(2, images=(InlineImage(b"picture", "image"),)),
        Row(3, images=(FileImage("picture"),)),
    ]

    assert await groups(rows, 100) == [[0, 2], [1], [3]]


async def test_a_group_is_bounded():
    found = await groups([row(number, "a") for number in range(MAX_GROUP_SIZE * 2 + 1)], 1000)

    assert list(map(len, found)) == [MAX_GROUP_SIZE, MAX_GROUP_SIZE, 1]


async def test_the_bytes_in_the_window_are_bounded(monkeypatch):
    monkeypatch.setattr(window, "INLINE_BYTES", 1000)
    taken = []

    async def given():
        for number in range(20):
            taken.append(number)
            yield Row(number, images=(InlineImage(bytes([number]) * 300, f"row {number}"),))

    async for group in group_by_images(given(), 100):
        if len(taken) < 20:
            assert len(taken) - group[0].number <= 5, "four rows have more than 1,000 bytes"


async def test_every_row_comes_out_once():
    drawn = random.Random(7)
    rows = [row(number, *(f"{drawn.randrange(40)}" for _ in range(drawn.randrange(3)))) for number in range(3000)]
    for size in (1, 2, 7, 50, 5000):
        found = await groups(rows, size)
        assert sorted(number for group in found for number in group) == list(range(3000))
        assert all(len({rows[number].images for number in group}) == 1 for group in found)
        assert [group[0] for group in found] == sorted(group[0] for group in found)
