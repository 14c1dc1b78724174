"""Images that LMDeploy itself prepares, in the engine's process: with a version that batchvl does not support."""

from __future__ import annotations

import asyncio
import threading

import pytest
import pytest_asyncio

from batchvl.ipc import arena
from batchvl.shapes import MODEL
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import LmdeployHarness, OpenRows, start_lmdeploy, wait_until

PREPARATION_SLOTS = 8
"""As in batchvl.engines.lmdeploy.model, which cannot be imported without LMDeploy."""

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared():
    async with start_lmdeploy(MODEL, prepares_images=True) as harness:
        yield harness


@pytest_asyncio.fixture(loop_scope="module")
async def lmdeploy(shared: LmdeployHarness):
    await shared.idle()
    yield shared
    await shared.idle()


@pytest_asyncio.fixture(loop_scope="module")
async def rows(lmdeploy: LmdeployHarness):
    rows = OpenRows(lmdeploy)
    yield rows
    await rows.close()


async def test_a_note_says_so(lmdeploy: LmdeployHarness):
    assert "batchvl supports 0.0.x" in lmdeploy.harness.info.notes[0]
    assert "LMDeploy itself prepares the images for InternVLForConditionalGeneration" in lmdeploy.harness.info.notes[1]


async def test_rows_are_aborted_in_the_preparation_and_while_they_wait_for_it(
    lmdeploy: LmdeployHarness, rows: OpenRows, monkeypatch
):
    model, gate = lmdeploy.model.engine.vl_encoder.model, asyncio.Event()
    preprocess, loop = model.preprocess, asyncio.get_running_loop()

    def blocked(messages):
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return preprocess(messages)

    monkeypatch.setattr(model, "preprocess", blocked)
    count = PREPARATION_SLOTS + 4
    for number in range(count):
        await rows.put(number, "quick", images=1)
    await wait_until(lambda: lmdeploy.in_use()["preparing"] == PREPARATION_SLOTS and lmdeploy.in_use()["rows"] == count)

    waiting, preparing = PREPARATION_SLOTS + 1, 2
    await rows.abort(waiting)
    await rows.abort(preparing)
    assert not any(task.done() for number, task in rows.tasks.items() if number not in (waiting, preparing))

    gate.set()
    for number in range(count):
        failure = (await rows.response(number)).failure
        assert (failure is None) == (number not in (waiting, preparing))


async def test_an_aborted_row_ends_only_after_its_images_were_read(
    lmdeploy: LmdeployHarness, rows: OpenRows, monkeypatch
):
    """The runner reuses the arena's memory as soon as a row has a response."""
    done_while_reading, gate = [], asyncio.Event()
    at = arena.ArenaView.at
    loop = asyncio.get_running_loop()

    def blocked(self, extent):
        if threading.current_thread() is threading.main_thread():
            return at(self, extent)  # this test writes the images
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        done_while_reading.append(rows.tasks[0].done())
        return at(self, extent)

    monkeypatch.setattr(arena.ArenaView, "at", blocked)
    await rows.put(0, "quick", images=1)
    await wait_until(lambda: lmdeploy.in_use()["preparing"] == 1)
    await lmdeploy.harness.engine.abort(0)
    await asyncio.sleep(3)  # longer than the time after which the row's task is cancelled
    assert not rows.tasks[0].done()
    gate.set()

    assert (await rows.response(0)).failure.code == "row_timeout"
    assert done_while_reading == [False]


async def test_the_memory_of_an_image_is_learned_from_the_first(lmdeploy: LmdeployHarness):
    """Before, InternVL's largest is assumed: with smaller images too few rows would be in the engine."""
    await lmdeploy.ask_once("Who?", [draw_image(90, 40)])
    await lmdeploy.idle()

    assert lmdeploy.model.tile_budget.image_bytes < 2**20


async def test_errors_of_lmdeploys_preparation_are_quoted(lmdeploy: LmdeployHarness, monkeypatch):
    def broken(messages):
        raise AssertionError("no such tile")

    def refused(messages):
        raise ValueError("no such image")

    for preprocess, code, message in (
        (broken, "prepare_failed", "preprocess_failed: Request preprocessing failed. (AssertionError: no such tile)"),
        (refused, "request_refused", "invalid_request: no such image"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lmdeploy.model.engine.vl_encoder.model, "preprocess", preprocess)
            response, requests = await lmdeploy.ask("hello", [draw_image(28, 28)])
        assert (response.failure.code, requests) == (code, [])
        assert message in response.failure.message
        await lmdeploy.idle()


async def test_a_row_is_aborted_while_it_waits_for_memory_for_its_images(lmdeploy: LmdeployHarness, rows: OpenRows):
    budget, loop = lmdeploy.model.tile_budget, lmdeploy.model.loop
    await rows.put(5, "quick", images=1)
    assert (await rows.response(5)).failure is None  # now the memory of an image is known
    everything = budget.acquire(budget.size // budget.image_bytes + 1)
    held = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(everything, loop))
    try:
        for number in range(3):
            await rows.put(number, "quick", images=1)
        await wait_until(lambda: lmdeploy.in_use()["rows"] == 3)
        await asyncio.sleep(0.1)
        assert lmdeploy.in_use()["sessions"] == 0, "they wait for memory"
        await rows.abort(1)
    finally:
        loop.call_soon_threadsafe(budget.release, held)
    assert [(await rows.response(number)).failure is None for number in range(3)] == [True, False, True]
