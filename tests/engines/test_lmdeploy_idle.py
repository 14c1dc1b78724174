"""When LMDeploy could compute more rows than it has, and when it is as busy as it can be."""

from __future__ import annotations

import asyncio
import time

import pytest

from batchvl.shapes import MODEL
from batchvl.types import Row
from tests.engines.cpu_core import ROWS
from tests.engines.lmdeploy_harness import LmdeployHarness, start_lmdeploy, wait_until

pytestmark = pytest.mark.lmdeploy


async def idle_share(lmdeploy: LmdeployHarness) -> float:
    """Return the share of the next second in which the engine waits, once it has noticed the last change."""
    from batchvl.engines.lmdeploy.handles import CHECK_SECONDS, QUEUE_SECONDS

    engine = lmdeploy.harness.engine
    await asyncio.sleep(3 * CHECK_SECONDS + QUEUE_SECONDS)
    before, since = engine.wait_seconds, time.monotonic()
    await asyncio.sleep(1)
    return (engine.wait_seconds - before) / (time.monotonic() - since)


async def test_it_is_idle_while_half_of_the_handles_are_free_and_no_row_waits_for_memory(monkeypatch):
    async with start_lmdeploy(MODEL, {"answer": "digest", "rules": {"go on": {"hang": True}}}) as lmdeploy:
        assert await idle_share(lmdeploy) == pytest.approx(1, abs=0.2), "without rows"

        tasks = []

        async def fill(rows: int) -> None:
            requests = [lmdeploy.request(Row(number, prompt="go on")) for number in range(len(tasks), rows)]
            tasks.extend(asyncio.create_task(lmdeploy.harness.ask((request, ()))) for request in requests)
            await wait_until(lambda: lmdeploy.core.in_flight == min(rows, ROWS))

        await fill(ROWS // 2 - 1)
        assert await idle_share(lmdeploy) == pytest.approx(1, abs=0.2), "with one row less than half"
        with monkeypatch.context() as patch:
            metrics = lmdeploy.core.get_schedule_metrics()
            metrics.waiting_seqs = 2
            patch.setattr(lmdeploy.core, "get_schedule_metrics", lambda: metrics)
            assert await idle_share(lmdeploy) == 0, "rows wait for memory"
        assert await idle_share(lmdeploy) == pytest.approx(1, abs=0.2), "rows wait no longer"
        await fill(ROWS // 2)
        assert await idle_share(lmdeploy) == 0, "with half of the rows"
        await fill(ROWS + 2)
        assert await idle_share(lmdeploy) == 0, "it computes all that it can, and two rows wait for a handle"

        await asyncio.gather(*(lmdeploy.harness.engine.abort(number) for number in range(len(tasks))), *tasks)
