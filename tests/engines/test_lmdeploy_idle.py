"""When LMDeploy could compute more rows than it has, and when it is as busy as it can be."""

from __future__ import annotations

import asyncio
import time

import pytest

from batchvl.shapes import MODEL
from batchvl.types import Row
from tests.engines.cpu_core import ROWS
from tests.engines.lmdeploy_line import CoreLine, with_core

pytestmark = pytest.mark.lmdeploy


async def waited(line: CoreLine) -> float:
    """The share of the next second in which it waited, after the moment that it takes to see a change."""
    engine = line.line.engine
    from batchvl.engines.lmdeploy.handles import CHECK_SECONDS, QUEUE_SECONDS

    await asyncio.sleep(3 * CHECK_SECONDS + QUEUE_SECONDS)
    before, since = engine.wait_seconds, time.monotonic()
    await asyncio.sleep(1)
    return (engine.wait_seconds - before) / (time.monotonic() - since)


async def test_it_waits_for_rows_while_half_of_the_handles_are_free_and_no_row_waits_for_memory(monkeypatch):
    async with with_core(MODEL, {"answer": "digest", "rules": {"go on": {"hang": True}}}) as line:
        assert await waited(line) == pytest.approx(1, abs=0.2), "without rows"

        answers = []

        async def fill(rows: int) -> None:
            requests = [line.request(Row(number, prompt="go on")) for number in range(len(answers), rows)]
            answers.extend(asyncio.create_task(line.line.ask((request, ()))) for request in requests)
            while line.core.inflight < min(rows, ROWS):
                await asyncio.sleep(0.01)

        await fill(ROWS // 2 - 1)
        assert await waited(line) == pytest.approx(1, abs=0.2), "with one row less than half"
        with monkeypatch.context() as patch:
            metrics = line.core.get_schedule_metrics()
            metrics.waiting_seqs = 2
            patch.setattr(line.core, "get_schedule_metrics", lambda: metrics)
            assert await waited(line) == 0, "rows wait for memory"
        assert await waited(line) == pytest.approx(1, abs=0.2), "no more"
        await fill(ROWS // 2)
        assert await waited(line) == 0, "with half of the rows"
        await fill(ROWS + 2)
        assert await waited(line) == 0, "it computes all that it can, and two wait for a handle"

        await asyncio.gather(*(line.line.engine.abort(number) for number in range(len(answers))), *answers)
