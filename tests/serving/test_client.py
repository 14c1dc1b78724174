"""When the engine is handed which rows: by how many it holds, and never over the rows that it may."""

import asyncio

import pytest

from batchvl.serving.process import EngineProcess
from tests.serving.supervised import request, supervised


@pytest.fixture
def lists(monkeypatch):
    """The lists that engines were handed, by their rows' numbers."""
    found = []
    infer = EngineProcess.infer

    def listen(process, requests):
        found.append([request.row for request in requests])
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", listen)
    return found


async def until(what):
    while not what():
        await asyncio.sleep(0.005)


async def test_slow_rows_do_not_hold_back_the_others(lists, tmp_path):
    """Each list has a slow row. By lists, the engine would be full of three of them, and 9 quick rows be answered."""
    slow = {0, 4, 8, 12, 16}
    async with supervised(tmp_path / "log", slow_every=4, rows=12) as engine:
        rows = {n: asyncio.create_task(engine.answer(request(n))) for n in range(20)}
        for number in rows.keys() - slow:
            assert (await rows[number]).texts == (f"row {number}",)
        assert all(engine.holds(number) for number in slow)
        assert engine.held == len(slow)
        await until(lambda: len(lists) == 5)
        more = [asyncio.create_task(engine.answer(request(n))) for n in range(21, 24)]
        assert [(await row).texts for row in more] == [(f"row {n}",) for n in range(21, 24)]
    assert lists == [[n, n + 1, n + 2, n + 3] for n in range(0, 20, 4)] + [[21, 22, 23]]


async def test_the_engine_holds_no_more_rows_than_it_may(lists, tmp_path, monkeypatch):
    most = 0
    infer = EngineProcess.infer

    def watch(process, requests):
        nonlocal most
        most = max(most, engine.held)
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", watch)
    async with supervised(tmp_path / "log", delay=0.002, spread=0.02, rows=10) as engine:
        await asyncio.gather(*(engine.answer(request(n)) for n in range(203)))
    assert most in (8, 9, 10)
    assert [n for rows in lists for n in rows] == list(range(203))
    assert [len(rows) for rows in lists] == [4] * 50 + [3]


async def test_rows_that_come_one_by_one_fill_it_to_the_last(lists, tmp_path):
    async with supervised(tmp_path / "log", delay=60, rows=6) as engine:
        rows = []
        for number in range(8):
            rows.append(asyncio.create_task(engine.answer(request(number))))
            await until(lambda held=number + 1: engine.held == min(held, 6))
        await asyncio.sleep(0.05)
        assert [number for number in range(8) if engine.holds(number)] == list(range(6))
    assert lists == [[number] for number in range(6)]
    assert len(await asyncio.gather(*rows, return_exceptions=True)) == 8


async def test_a_list_is_no_longer_than_what_the_engine_may_hold(lists, tmp_path):
    async with supervised(tmp_path / "log", rows=3) as engine:
        await asyncio.gather(*(engine.answer(request(n)) for n in range(7)))
    assert lists == [[0, 1, 2], [3, 4, 5], [6]]
