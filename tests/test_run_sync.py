"""`run_sync`: a coroutine in an event loop of its own, for commands and for callers of the library."""

import asyncio
import gc
import weakref

import pytest

from batchvl import concurrency
from batchvl.concurrency import run_sync


def interrupt():
    raise AssertionError("nobody pressed Ctrl-C")


def settings():
    return gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()


class Cycle:
    def __init__(self):
        self.itself = self


async def test_it_runs_beside_a_running_loop():
    async def work():
        return asyncio.get_running_loop()

    assert await asyncio.to_thread(run_sync, work, interrupt) is not asyncio.get_running_loop()
    assert run_sync(work, interrupt) is not asyncio.get_running_loop()


@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_of_the_caller_is_as_it_was(fails):
    during = []

    async def work():
        during.append(settings())
        if fails:
            raise KeyError("by order")

    before = settings()
    try:
        run_sync(work, interrupt)
    except KeyError:
        assert fails
    assert settings() == before
    assert during[0][0][0] > before[0][0]
    assert during[0][1] > 0


def test_what_a_caller_has_frozen_stays_frozen():
    async def work():
        pass

    gc.freeze()
    try:
        run_sync(work, interrupt)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_garbage_of_a_run_is_collected_meanwhile():
    async def work():
        garbage = weakref.ref(Cycle())
        kept = []
        while garbage() is not None and len(kept) < 10 * concurrency._COLLECTION_OBJECTS:
            kept.append([])
        return garbage() is None

    assert run_sync(work, interrupt)
