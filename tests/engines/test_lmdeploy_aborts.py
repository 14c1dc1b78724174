"""Rows are aborted wherever they are in LMDeploy: they end soon, leave nothing behind and affect no other row."""

from __future__ import annotations

import asyncio

import pytest
import pytest_asyncio

from batchvl.shapes import MODEL
from batchvl.types import Row
from tests.engines.cpu_core import ROWS
from tests.engines.lmdeploy_harness import ABORT_LIMIT, LmdeployHarness, OpenRows, start_lmdeploy, wait_until

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True], ids=["core", "LMDeploy's handles"])
async def shared(request: pytest.FixtureRequest):
    slow = {"delay": 0.5, "answer": "text", "text": "z" * 200}
    behaviour = {"answer": "digest", "rules": {"slow": slow}, "own_handles": request.param}
    async with start_lmdeploy(MODEL, behaviour) as harness:
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


async def test_a_row_that_is_being_answered(lmdeploy: LmdeployHarness, rows: OpenRows):
    await rows.put(0, "slow", images=1)
    await wait_until(lambda: lmdeploy.core.in_flight == 1)
    await rows.put(1, "quick", images=1)
    assert (await rows.response(1)).failure is None

    await rows.abort(0, within=1)

    await lmdeploy.idle()


async def test_a_row_that_waits_for_a_handle(lmdeploy: LmdeployHarness, rows: OpenRows):
    for number in range(ROWS):
        await rows.put(number, "slow")
    await wait_until(lambda: lmdeploy.core.in_flight == ROWS)
    for number in (20, 21, 22):
        await rows.put(number, "quick", images=1)
    await wait_until(lambda: lmdeploy.in_use()["rows"] == ROWS + 3 and not lmdeploy.in_use()["preparing"])

    await rows.abort(21)
    assert lmdeploy.core.in_flight == ROWS, "the others are not affected"
    assert not rows.tasks[20].done()
    assert not rows.tasks[22].done()

    await rows.abort(3, within=1)
    for number in (20, 22):
        assert (await rows.response(number)).failure is None, "the handle is free for the others"
    assert lmdeploy.core.in_flight == ROWS - 1


async def test_all_handles_are_returned(lmdeploy: LmdeployHarness, rows: OpenRows):
    for number in range(ROWS * 2):
        await rows.put(number, "slow", images=number % 2)
    await wait_until(lambda: lmdeploy.core.in_flight == ROWS)
    await asyncio.gather(*(rows.abort(number, within=2 * ABORT_LIMIT) for number in range(ROWS * 2)))
    await lmdeploy.idle()

    for number in range(100, 100 + ROWS * 2):
        await rows.put(number, "quick", images=1)
    for number in range(100, 100 + ROWS * 2):
        assert (await rows.response(number)).failure is None
    assert lmdeploy.core.peak == ROWS


async def test_a_row_of_several_turns_keeps_those_that_were_answered(lmdeploy: LmdeployHarness, rows: OpenRows):
    await rows.put(0, ["quick", "slow", "never asked"], images=1)
    await wait_until(lambda: lmdeploy.core.in_flight == 1 and "slow" in lmdeploy.core.requests[-1].prompt)
    before = len(lmdeploy.core.requests)

    response = await rows.abort(0, within=1)

    assert len(response.texts) == 1
    await lmdeploy.idle()
    assert len(lmdeploy.core.requests) == before
    assert response.output_tokens > 0


async def test_rows_of_one_batch_do_not_wait_for_one_another(lmdeploy: LmdeployHarness):
    requests = [
        lmdeploy.request(Row(number, prompt="slow" if number == 0 else "quick"), max_new_tokens=200)
        for number in range(20)
    ]
    order = []
    async for response in lmdeploy.harness.infer([(request, []) for request in requests]):
        order.append(response.row)
        if len(order) == 19:
            await lmdeploy.harness.engine.abort(0)

    assert order[-1] == 0
    assert sorted(order) == list(range(20))


async def test_a_batch_ends_when_its_caller_stops_listening(lmdeploy: LmdeployHarness):
    requests = [lmdeploy.request(Row(number, prompt="slow")) for number in range(ROWS + 4)]
    responses = lmdeploy.harness.infer([(request, []) for request in requests])
    listening = asyncio.create_task(anext(responses))
    await wait_until(lambda: lmdeploy.core.in_flight == ROWS)

    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    await responses.aclose()

    await wait_until(lambda: not any(lmdeploy.in_use().values()))


async def test_aborting_an_unknown_row_does_nothing(lmdeploy: LmdeployHarness, rows: OpenRows):
    await lmdeploy.harness.engine.abort(12345)
    await rows.put(0, "quick")
    assert (await rows.response(0)).failure is None
    await lmdeploy.harness.engine.abort(0)
    await rows.put(1, "quick")
    assert (await rows.response(1)).failure is None
