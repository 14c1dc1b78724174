"""Rows that share their images form a group, within bounds, and no row is lost or doubled."""

import random

import pytest

from batchvl.images.grouping import MAX_GROUP_SIZE, group_by_images
from batchvl.types import Failure, FileImage, InlineImage, Row, WebImage


def row(number, *names, failure=None):
    return Row(number, images=tuple(WebImage(name) for name in names), failure=failure)


async def groups(rows, window):
    async def stream():
        for each in rows:
            yield each

    return [[each.number for each in group] async for group in group_by_images(stream(), window)]


async def test_rows_with_the_same_images_form_a_group_in_the_order_of_the_first():
    rows = [row(0, "a"), row(1, "b"), row(2, "a"), row(3, "c"), row(4, "b"), row(5, "a")]

    assert await groups(rows, 100) == [[0, 2, 5], [1, 4], [3]]


async def test_only_rows_within_the_window_form_a_group():
    rows = [row(number, "a" if number in (0, 3, 9) else f"{number}") for number in range(12)]

    assert await groups(rows, 5) == [[0, 3], *([number] for number in range(1, 12) if number != 3)]


async def test_if_few_rows_are_left_the_first_does_not_wait_for_a_full_window():
    read = []

    async def remaining():
        for number in range(5, 100_000, 10_000):
            read.append(number)
            yield row(number, "a")

    assert [len(read) async for _ in group_by_images(remaining(), 4096)] == [*range(2, 11), 10]


@pytest.mark.parametrize("window", [0, 1])
async def test_without_a_window_each_row_is_alone(window):
    assert await groups([row(0, "a"), row(1, "a")], window) == [[0], [1]]


async def test_rows_share_images_only_if_all_are_the_same_in_the_same_order():
    rows = [row(0, "a", "b"), row(1, "b", "a"), row(2, "a"), row(3, "a", "b"), row(4, "a", "a")]

    assert await groups(rows, 100) == [[0, 3], [1], [2], [4]]


async def test_rows_without_images_and_unreadable_rows_are_alone():
    bad = Failure("bad", "manifest", "no", retryable=False)

    rows = [row(0), row(1), row(2, "a", failure=bad), row(3, "a", failure=bad)]

    assert await groups(rows, 100) == [[0], [1], [2], [3]]


async def test_inline_images_are_the_same_if_their_bytes_are():
    rows = [
        Row(0, images=(InlineImage(b"image", "image"),)),
        Row(1, images=(InlineImage(b"another", "image"),)),
        Row(2, images=(InlineImage(b"image", "image"),)),
        Row(3, images=(FileImage("image"),)),
    ]

    assert await groups(rows, 100) == [[0, 2], [1], [3]]


async def test_the_size_of_a_group_is_bounded():
    rows = [row(number, "a") for number in range(MAX_GROUP_SIZE * 2 + 1)]

    assert list(map(len, await groups(rows, 1000))) == [MAX_GROUP_SIZE, MAX_GROUP_SIZE, 1]


async def test_the_bytes_in_the_window_are_bounded():
    read = []

    async def stream():
        for number in range(20):
            read.append(number)
            yield Row(number, images=(InlineImage(bytes([number]) * 300, f"row {number}"),))

    async for group in group_by_images(stream(), 100, max_inline_bytes=1000):
        if len(read) < 20:
            assert len(read) - group[0].number <= 5, "four rows have more than 1,000 bytes"


async def test_every_row_is_in_exactly_one_group():
    rng = random.Random(7)
    rows = [row(number, *(f"{rng.randrange(40)}" for _ in range(rng.randrange(3)))) for number in range(3000)]
    for window in (1, 2, 7, 50, 5000):
        result = await groups(rows, window)
        assert sorted(number for group in result for number in group) == list(range(3000))
        assert all(len({rows[number].images for number in group}) == 1 for group in result)
        assert [group[0] for group in result] == sorted(group[0] for group in result)
