"""Rows that are told to end, wherever in LMDeploy they are: they do, soon, leave nothing behind and harm nobody."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from batchvl.shapes import MODEL
from batchvl.types import Row
from tests.engines.cpu_core import ROWS
from tests.engines.lmdeploy_line import SOON, CoreLine, Rows, until, with_core

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True], ids=["core", "LMDeploy's handles"])
async def engine(request: pytest.FixtureRequest):
    slow = {"delay": 0.5, "answer": "say", "say": "z" * 200}
    async with with_core(MODEL, {"answer": "digest", "rules": {"slow": slow}, "own_handles": request.param}) as found:
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


async def test_a_row_that_is_being_answered(line: CoreLine, rows: Rows):
    await rows.put(0, "slow", pictures=1)
    await until(lambda: line.core.inflight == 1)
    await rows.put(1, "quick", pictures=1)
    assert (await rows[1]).failure is None

    await rows.aborted(0, within=1)

    await line.idle()


async def test_a_row_that_waits_for_a_handle(line: CoreLine, rows: Rows):
    for number in range(ROWS):
        await rows.put(number, "slow")
    await until(lambda: line.core.inflight == ROWS)
    for number in (20, 21, 22):
        await rows.put(number, "quick", pictures=1)
    await until(lambda: line.left()["rows"] == ROWS + 3 and not line.left()["preparing"])

    await rows.aborted(21)
    assert line.core.inflight == ROWS, "the others were left alone"
    assert not rows.answers[20].done()
    assert not rows.answers[22].done()

    await rows.aborted(3, within=1)
    for number in (20, 22):
        assert (await rows[number]).failure is None, "the handle is free for the others"
    assert line.core.inflight == ROWS - 1


async def test_all_handles_come_back(line: CoreLine, rows: Rows):
    for number in range(ROWS * 2):
        await rows.put(number, "slow", pictures=number % 2)
    await until(lambda: line.core.inflight == ROWS)
    await asyncio.gather(*(rows.aborted(number, within=2 * SOON) for number in range(ROWS * 2)))
    await line.idle()

    for number in range(100, 100 + ROWS * 2):
        await rows.put(number, "quick", pictures=1)
    for number in range(100, 100 + ROWS * 2):
        assert (await rows[number]).failure is None
    assert line.core.peak == ROWS


async def test_a_row_of_several_turns_ends_with_those_it_has(line: CoreLine, rows: Rows):
    await rows.put(0, ["quick", "slow", "never asked"], pictures=1)
    await until(lambda: line.core.inflight == 1 and "slow" in line.core.asked[-1].prompt)
    before = len(line.core.asked)

    response = await rows.aborted(0, within=1)

    assert len(response.texts) == 1
    await line.idle()
    assert len(line.core.asked) == before
    assert response.output_tokens > 0


async def test_rows_of_one_list_do_not_wait_for_one_another(line: CoreLine):
    asked = [
        line.request(Row(number, prompt="slow" if number == 0 else "quick"), max_new_tokens=200) for number in range(20)
    ]
    found = []
    async for response in line.line.infer([(each, []) for each in asked]):
        found.append(response.row)
        if len(found) == 19:
            await line.line.engine.abort(0)

    assert found[-1] == 0
    assert sorted(found) == list(range(20))


async def test_a_list_that_nobody_listens_to_any_more_ends(line: CoreLine):
    answers = line.line.infer([(line.request(Row(number, prompt="slow")), []) for number in range(ROWS + 4)])
    listening = asyncio.create_task(anext(answers))
    await until(lambda: line.core.inflight == ROWS)

    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await answers.aclose()

    await until(lambda: not any(line.left().values()))


async def test_aborting_a_row_that_is_not_there_does_nothing(line: CoreLine, rows: Rows):
    await line.line.engine.abort(12345)
    await rows.put(0, "quick")
    assert (await rows[0]).failure is None
    await line.line.engine.abort(0)
    await rows.put(1, "quick")
    assert (await rows[1]).failure is None
