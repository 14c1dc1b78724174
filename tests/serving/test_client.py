"""Batching: what the engine receives when, by the number of rows in flight, and never more rows than its limit."""

import asyncio

from batchvl.serving.process import EngineProcess
from tests.serving.supervised import eventually, request, supervised


async def test_slow_rows_do_not_hold_back_the_others(batches, tmp_path):
    """Each batch has a slow row. If whole batches counted, three of them would fill the engine after 9 answers."""
    slow = {0, 4, 8, 12, 16}
    async with supervised(tmp_path / "log", slow_every=4, rows=12) as engine:
        rows = {n: asyncio.create_task(engine.answer(request(n))) for n in range(20)}
        for number in rows.keys() - slow:
            assert (await rows[number]).texts == (f"row {number}",)
        assert all(engine.holds(number) for number in slow)
        assert engine.in_flight == len(slow)
        await eventually(lambda: len(batches) == 5)
        more = [asyncio.create_task(engine.answer(request(n))) for n in range(21, 24)]
        assert [(await row).texts for row in more] == [(f"row {n}",) for n in range(21, 24)]
    assert [batch.rows for batch in batches] == [[n, n + 1, n + 2, n + 3] for n in range(0, 20, 4)] + [[21, 22, 23]]


async def test_the_engine_holds_no_more_rows_than_its_limit(batches, tmp_path, monkeypatch):
    most = 0
    infer = EngineProcess.infer

    def watch(process, requests):
        nonlocal most
        most = max(most, engine.in_flight)
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", watch)
    async with supervised(tmp_path / "log", delay=0.002, spread=0.02, rows=10) as engine:
        await asyncio.gather(*(engine.answer(request(n)) for n in range(203)))
    assert most in (8, 9, 10)
    assert [n for batch in batches for n in batch.rows] == list(range(203))
    assert [len(batch.rows) for batch in batches] == [4] * 50 + [3]


async def test_rows_that_arrive_one_by_one_fill_it_to_its_limit(batches, tmp_path):
    async with supervised(tmp_path / "log", delay=60, rows=6) as engine:
        rows = []
        for number in range(8):
            rows.append(asyncio.create_task(engine.answer(request(number))))
            await eventually(lambda count=number + 1: engine.in_flight == min(count, 6))
        await asyncio.sleep(0.05)
        assert [number for number in range(8) if engine.holds(number)] == list(range(6))
    assert [batch.rows for batch in batches] == [[number] for number in range(6)]
    assert len(await asyncio.gather(*rows, return_exceptions=True)) == 8


async def test_a_batch_is_no_larger_than_the_engines_limit(batches, tmp_path):
    async with supervised(tmp_path / "log", rows=3) as engine:
        await asyncio.gather(*(engine.answer(request(n)) for n in range(7)))
    assert [batch.rows for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
