"""The arena's ledger: extents never overlap, waiters are served in order, and no block is leaked."""

import asyncio
import os
import random

import pytest

from batchvl.errors import TooLarge
from batchvl.ipc.arena import Arena, ArenaView
from batchvl.types import Extent

BLOCK = 4096


@pytest.fixture
def arena():
    arena = Arena(8, BLOCK)
    yield arena
    arena.close()


async def test_extents_have_the_requested_sizes_and_do_not_overlap(arena):
    extents = await arena.reserve([1, BLOCK, BLOCK + 1])
    for i, extent in enumerate(extents):
        arena.at(extent)[:] = bytes([i]) * extent.length
    assert [bytes(arena.at(e)) for e in extents] == [b"\0", b"\1" * BLOCK, b"\2" * (BLOCK + 1)]
    assert arena.free_blocks == 4
    arena.release(*extents)
    assert arena.free_blocks == 8


async def test_more_than_the_whole_arena_is_refused(arena):
    with pytest.raises(TooLarge, match=r"needs 32,769 bytes of the arena's 32,768: .*--arena-bytes"):
        await arena.reserve([8 * BLOCK + 1])
    assert arena.free_blocks == 8


async def test_waiters_get_all_extents_at_once_in_order_of_arrival(arena):
    [first] = await arena.reserve([6 * BLOCK])
    large = asyncio.create_task(arena.reserve([2 * BLOCK, BLOCK]))
    small = asyncio.create_task(arena.reserve([BLOCK]))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not large.done()
    assert not small.done(), "a small row must not overtake a large one, which could starve"
    arena.release(first)
    assert [e.length for e in await large] == [2 * BLOCK, BLOCK]
    assert len(await small) == 1


async def test_shrinking_frees_blocks_for_waiters(arena):
    [first] = await arena.reserve([8 * BLOCK])
    waiting = asyncio.create_task(arena.reserve([7 * BLOCK]))
    await asyncio.sleep(0)
    assert arena.shrink(first, 10) == Extent(0, 10)
    [second] = await waiting
    assert second.start == BLOCK
    arena.release(first, second)
    assert arena.free_blocks == 8


async def test_a_cancelled_waiter_does_not_block_the_next(arena):
    await arena.reserve([4 * BLOCK])
    large = asyncio.create_task(arena.reserve([5 * BLOCK]))
    small = asyncio.create_task(arena.reserve([4 * BLOCK]))
    await asyncio.sleep(0)
    large.cancel()
    assert [e.length for e in await small] == [4 * BLOCK]


async def test_random_use(arena):
    rng = random.Random(0)
    owners: dict[int, int] = {}

    async def row(number: int) -> None:
        sizes = [rng.randint(1, 2 * BLOCK) for _ in range(rng.randint(1, 3))]
        task = asyncio.create_task(arena.reserve(sizes))
        if rng.random() < 0.2:
            await asyncio.sleep(0)
            task.cancel()
        try:
            extents = await task
        except asyncio.CancelledError:
            return
        if rng.random() < 0.3:
            extents[0] = arena.shrink(extents[0], 1)
        blocks = [b for e in extents for b in range(e.start // BLOCK, (e.start + max(e.length, 1) - 1) // BLOCK + 1)]
        for block in blocks:
            assert block not in owners
            owners[block] = number
        await asyncio.sleep(rng.choice([0, 0.0001]))
        for block in blocks:
            assert owners.pop(block) == number
        arena.release(*extents)

    await asyncio.gather(*(row(i) for i in range(500)))
    assert arena.free_blocks == 8


def test_two_mappings_share_the_same_bytes(arena):
    view = ArenaView(os.dup(arena.fd), arena.size)
    arena.at(Extent(100, 5))[:] = b"hello"
    assert bytes(view.at(Extent(100, 5))) == b"hello"
    view.close()


async def test_a_waiter_cancelled_together_with_the_holder(arena):
    [held] = await arena.reserve([8 * BLOCK])

    async def holder():
        try:
            await asyncio.sleep(60)
        finally:
            arena.release(held)

    holding, waiting = asyncio.create_task(holder()), asyncio.create_task(arena.reserve([BLOCK]))
    await asyncio.sleep(0)
    holding.cancel()
    waiting.cancel()
    ends = await asyncio.gather(holding, waiting, return_exceptions=True)
    assert [type(end) for end in ends] == [asyncio.CancelledError] * 2
    assert arena.free_blocks == 8
