"""Pictures that LMDeploy prepares itself, in the engine's process: those of a version that batchvl does not know."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from batchvl.ipc import arena
from batchvl.shapes import MODEL
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import CoreLine, Rows, until, with_core

PREPARATION_SLOTS = 8
"""As in batchvl.engines.lmdeploy.model, which this file may not import without LMDeploy."""

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with with_core(MODEL, own=True) as found:
        yield found


@pytest_asyncio.fixture(loop_scope="module")
async def line(engine: CoreLine):
    await engine.idle()
    yield engine
    await engine.idle()


@pytest_asyncio.fixture(loop_scope="module")
async def rows(line: CoreLine):
    found = Rows(line)
    yield found
    await found.end()


async def test_that_it_does_is_told(line: CoreLine):
    assert "batchvl supports 0.0.x" in line.line.info.notes[0]
    assert "LMDeploy itself prepares the images for InternVLForConditionalGeneration" in line.line.info.notes[1]


async def test_rows_in_lmdeploy_s_preparation_and_in_line_for_it(line: CoreLine, rows: Rows, monkeypatch):
    model, gate = line.loaded.engine.vl_encoder.model, asyncio.Event()
    prepare, loop = model.preprocess, asyncio.get_running_loop()

    def slowly(messages):
        asyncio.run_coroutine_threadsafe(gate.wait(), loop).result()
        return prepare(messages)

    monkeypatch.setattr(model, "preprocess", slowly)
    for number in range(PREPARATION_SLOTS + 4):
        await rows.put(number, "quick", pictures=1)
    await until(lambda: line.left()["preparing"] == PREPARATION_SLOTS and line.left()["rows"] == PREPARATION_SLOTS + 4)

    await rows.aborted(PREPARATION_SLOTS + 1)  # in line
    await rows.aborted(2)  # one of those at work
    assert not any(answer.done() for number, answer in rows.answers.items() if number not in (2, PREPARATION_SLOTS + 1))

    gate.set()
    for number in range(PREPARATION_SLOTS + 4):
        failure = (await rows[number]).failure
        assert (failure is None) == (number not in (2, PREPARATION_SLOTS + 1))


async def test_an_aborted_row_s_answer_is_not_told_before_its_pictures_are_read(
    line: CoreLine, rows: Rows, monkeypatch
):
    """The runner gives the arena's bytes to somebody else the moment a row is answered."""
    read, late = [], asyncio.Event()
    at = arena.ArenaView.at
    loop = asyncio.get_running_loop()

    def slowly(self, extent):
        import threading

        if threading.current_thread() is threading.main_thread():
            return at(self, extent)  # this test's own writing
        asyncio.run_coroutine_threadsafe(late.wait(), loop).result()
        read.append(rows.answers[0].done())
        return at(self, extent)

    monkeypatch.setattr(arena.ArenaView, "at", slowly)
    await rows.put(0, "quick", pictures=1)
    await until(lambda: line.left()["preparing"] == 1)
    await line.line.engine.abort(0)
    await asyncio.sleep(3)
    assert not rows.answers[0].done()
    late.set()

    assert (await rows[0]).failure.code == "row_timeout"
    assert read == [False]


async def test_room_for_pictures_is_learnt_from_what_they_take(line: CoreLine):
    """InternVL's largest is assumed before: of a model with smaller ones too few rows would be in at once."""
    await line.asked("Who?", [picture(90, 40)])
    await line.idle()

    assert line.loaded.tile_budget.image_bytes < 2**20


async def test_what_lmdeploy_s_preparation_raises_is_quoted(line: CoreLine, monkeypatch):
    def broken(messages):
        raise AssertionError("no such tile")

    def refused(messages):
        raise ValueError("no such picture")

    for preprocess, code, said in (
        (broken, "prepare_failed", "preprocess_failed: Request preprocessing failed. (AssertionError: no such tile)"),
        (refused, "request_refused", "invalid_request: no such picture"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(line.loaded.engine.vl_encoder.model, "preprocess", preprocess)
            response, asked = await line.ask("hello", [picture(28, 28)])
        assert (response.failure.code, asked) == (code, [])
        assert said in response.failure.message
        await line.idle()


async def test_a_row_that_waits_for_room_for_its_pictures(line: CoreLine, rows: Rows):
    budget = line.loaded.tile_budget
    await rows.put(5, "quick", pictures=1)
    assert (await rows[5]).failure is None  # now it is known what a picture takes
    acquiring = budget.acquire(budget.size // budget.image_bytes + 1)
    held = await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(acquiring, line.loaded.loop))
    try:
        for number in range(3):
            await rows.put(number, "quick", pictures=1)
        await until(lambda: line.left()["rows"] == 3)
        await asyncio.sleep(0.1)
        assert line.left()["sessions"] == 0, "they wait for room"
        await rows.aborted(1)
    finally:
        line.loaded.loop.call_soon_threadsafe(budget.release, held)
    assert [(await rows[number]).failure is None for number in range(3)] == [True, False, True]
