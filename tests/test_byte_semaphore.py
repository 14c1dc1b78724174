"""Bytes in flight: never more than there are, and nobody waits for ever."""

import asyncio

import pytest

from batchvl.concurrency import ByteSemaphore


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_who_finds_too_little_waits():
    budget = ByteSemaphore(10)
    await budget.take(8)
    waiting = asyncio.ensure_future(budget.take(3))
    await settled()
    assert not waiting.done()
    budget.give(8)
    await waiting


async def test_a_large_amount_is_not_passed_by_small_ones():
    budget = ByteSemaphore(10)
    for _ in range(10):
        await budget.take(1)
    large = asyncio.ensure_future(budget.take(6))
    small = [asyncio.ensure_future(budget.take(1)) for _ in range(20)]
    await settled()
    for given in range(6):
        assert not large.done(), given
        assert not any(task.done() for task in small)
        budget.give(1)
        await settled()
    assert large.done()
    assert not any(task.done() for task in small), "all that there was is out"
    budget.give(6)
    await settled()
    assert sum(task.done() for task in small) == 6
    for task in small:
        task.cancel()


async def test_more_than_there_is_may_be_out_alone():
    budget = ByteSemaphore(10)
    await budget.take(50)
    other = asyncio.ensure_future(budget.take(1))
    await settled()
    assert not other.done()
    budget.give(50)
    await other


@pytest.mark.parametrize("given_first", [False, True])
async def test_who_gives_up_waiting_leaves_its_place_to_the_next(given_first):
    budget = ByteSemaphore(10)
    await budget.take(10)
    first, second = (asyncio.ensure_future(budget.take(amount)) for amount in (9, 10))
    await settled()
    if given_first:
        budget.give(10)  # the first has its turn, and is cancelled before it knows
        first.cancel()
    else:
        first.cancel()
        await settled()
        budget.give(10)
    await asyncio.wait_for(second, 1)
    assert first.cancelled()
    budget.give(10)
    await asyncio.wait_for(budget.take(10), 1)
