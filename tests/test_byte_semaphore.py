"""`ByteSemaphore`: the total is never exceeded, and no waiter starves."""

import asyncio

import pytest

from batchvl.concurrency import ByteSemaphore


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_acquire_waits_for_enough_free_bytes():
    semaphore = ByteSemaphore(10)
    await semaphore.acquire(8)
    waiter = asyncio.ensure_future(semaphore.acquire(3))
    await settle()
    assert not waiter.done()
    semaphore.release(8)
    await waiter


async def test_small_amounts_do_not_overtake_a_large_one():
    semaphore = ByteSemaphore(10)
    for _ in range(10):
        await semaphore.acquire(1)
    large = asyncio.ensure_future(semaphore.acquire(6))
    small = [asyncio.ensure_future(semaphore.acquire(1)) for _ in range(20)]
    await settle()
    for released in range(6):
        assert not large.done(), released
        assert not any(task.done() for task in small)
        semaphore.release(1)
        await settle()
    assert large.done()
    assert not any(task.done() for task in small), "no bytes are free"
    semaphore.release(6)
    await settle()
    assert sum(task.done() for task in small) == 6
    for task in small:
        task.cancel()


async def test_an_amount_above_the_total_is_granted_alone():
    semaphore = ByteSemaphore(10)
    await semaphore.acquire(50)
    other = asyncio.ensure_future(semaphore.acquire(1))
    await settle()
    assert not other.done()
    semaphore.release(50)
    await other


@pytest.mark.parametrize("granted", [False, True])
async def test_a_cancelled_waiter_passes_its_turn_on(granted):
    semaphore = ByteSemaphore(10)
    await semaphore.acquire(10)
    first, second = (asyncio.ensure_future(semaphore.acquire(amount)) for amount in (9, 10))
    await settle()
    if granted:
        semaphore.release(10)  # the first waiter's turn has come, and it is cancelled before it runs
        first.cancel()
    else:
        first.cancel()
        await settle()
        semaphore.release(10)
    await asyncio.wait_for(second, 1)
    assert first.cancelled()
    semaphore.release(10)
    await asyncio.wait_for(semaphore.acquire(10), 1)
