"""An engine whose memory grows is replaced between rows, and no answer shows it."""

import asyncio
import re

import pytest

from batchvl.hardware.limits import memory
from batchvl.serving import recycle as growth
from batchvl.serving.exits import EngineExited
from batchvl.serving.process import EngineProcess
from batchvl.serving.recycle import RecyclePolicy, format_bytes
from tests.runner.running import children, questions, responses, run
from tests.serving.supervised import process_of, request, supervised

MIB = 2**20


@pytest.fixture
def watched(monkeypatch):
    monkeypatch.setattr("batchvl.serving.replica.MEMORY_SECONDS", 0.02)


@pytest.fixture
def asked(monkeypatch, watched):
    """The rows that engines were asked, with the process that was; no restart comes too soon."""
    found = []
    infer = EngineProcess.infer

    def listen(process, requests):
        found.extend((r.row, process.pid) for r in requests)
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", listen)
    monkeypatch.setattr(growth, "LEAST_STARTS", 0)
    monkeypatch.setattr(growth, "LEAST_UP_SECONDS", 0)
    return found


async def test_a_grown_engine_is_replaced_and_every_row_asked_once(asked, tmp_path, logged):
    async with supervised(tmp_path / "log", grow=MIB, delay=0.01, spread=0.05, engine_memory=60 * MIB) as engine:
        answers = await asyncio.gather(*(engine.answer(request(i)) for i in range(300)))
        assert engine.deaths == 0
        assert 2 <= engine.restarts <= 8
        assert engine.wait_share < 0.2, "being replaced is no wait for rows"
    assert [a.texts for a in answers] == [(f"row {i}",) for i in range(300)]
    assert sorted(row for row, _ in asked) == list(range(300))
    assert len({pid for _, pid in asked}) == engine.restarts + 1
    pattern = r"the engine holds \d+ MiB of memory, more than 60 MiB \(--engine-memory\): it is started afresh, once"
    assert sum(bool(re.match(pattern, line)) for line in logged) in (engine.restarts, engine.restarts + 1)
    assert sum("up again" in line for line in logged) == engine.restarts


async def test_memory_of_forks_counts(asked, tmp_path):
    async with supervised(tmp_path / "alone") as alone, supervised(tmp_path / "log", forks=3) as engine:
        await alone.started()
        await engine.started()
        assert await process_of(engine).memory() > 2 * await process_of(alone).memory()


async def test_a_restart_must_gain_something(asked, tmp_path, logged):
    async with supervised(tmp_path / "log", engine_memory=MIB) as engine:
        await engine.answer(request(0))
        await asyncio.sleep(0.3)
        assert (await engine.answer(request(1))).texts == ("row 1",)
        assert (engine.restarts, engine.deaths) == (0, 0)
    [note] = logged
    assert re.fullmatch(r"note: the engine holds \d+ MiB .* afresh at \d+ MiB, not at 1 MiB \(--engine-memory\)", note)


async def test_a_row_past_its_time_does_not_hold_up_the_restart(asked, tmp_path):
    async with supervised(tmp_path / "log", slow_every=7, row_timeout=2.0, grow=80 * MIB, engine_memory=60 * MIB) as e:
        slow, quick = await asyncio.gather(e.answer(request(7)), e.answer(request(1)))
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert (e.restarts, e.deaths) == (1, 0)
    assert quick.texts == ("row 1",)
    assert slow.failure.code == "row_timeout"


async def test_a_hang_while_it_waits_is_a_death(asked, tmp_path, monkeypatch, logged):
    monkeypatch.setattr("batchvl.serving.replica.MEMORY_SECONDS", 0.3)
    hang = {"hang_on": [3], "hang_timeout": 0.9, "batch_size": 1}
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB, **hang) as engine:
        await engine.answer(request(1))
        with pytest.raises(EngineExited, match=r"no progress for 0\.9 s"):
            await engine.answer(request(3))
        assert (engine.deaths, engine.restarts) == (1, 0)
        assert (await engine.answer(request(2))).texts == ("row 2",)
    assert logged[0].endswith("it is started afresh, once it has answered the 1 row that it has")


async def test_the_run_may_end_while_the_engine_is_replaced(asked, tmp_path):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        await engine.answer(request(1))
        while engine._replicas[0]._closing is None:
            await asyncio.sleep(0)
    assert not children()


async def test_a_kill_while_the_engine_is_replaced_is_final(asked, tmp_path):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        await engine.answer(request(1))
        while engine._replicas[0]._closing is None:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(engine.answer(request(2)))
        await asyncio.sleep(0)
        engine.kill("the run is stopping")
        with pytest.raises(EngineExited):
            await waiting
        assert (engine.restarts, engine.deaths) == (0, 0)


def test_a_run_counts_restarts(asked, tmp_path):
    summary = run(
        questions(tmp_path / "m.jsonl", 200), {"grow": MIB, "delay": 0.02}, batch_size=4, engine_memory="60MiB"
    )
    assert responses(summary) == [f"q {n}" for n in range(200)]
    assert (summary.exit_code, summary.engine_deaths) == (0, 0)
    assert summary.engine_restarts >= 1
    assert "the engine was started afresh" in str(summary)
    assert not children()


async def test_memory_that_grows_soon_after_the_start_lifts_the_limit(watched, tmp_path, logged):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        for row in range(4):
            await engine.answer(request(row))
            await asyncio.sleep(0.2)
        assert (engine.restarts, engine.deaths) == (0, 0)
    [note] = logged
    assert re.fullmatch(r"note: .* \d+ MiB of memory soon after its start: .* at \d+ MiB, not at 60 MiB .*", note)


@pytest.fixture
def now(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("batchvl.serving.recycle.time.monotonic", lambda: clock[0])
    return clock


def test_the_limit_is_lifted_at_the_start(logged):
    limit = RecyclePolicy(100 * MIB)
    limit.started(50 * MIB, 1)
    assert (limit.bytes, logged) == (100 * MIB, [])
    limit.started(160 * MIB, 1)
    assert limit.bytes == 200 * MIB
    limit.started(120 * MIB, 1)
    assert limit.bytes == 150 * MIB
    [note] = logged
    assert "160 MiB of memory from its start on: it is started afresh at 200 MiB, not at 100 MiB" in note
    assert RecyclePolicy(None).bytes == memory() * 3 // 4
    assert format_bytes(3 * 2**29) == "1.5 GiB"


@pytest.mark.parametrize(("seconds", "settled"), [(2, 300), (60, 600)])
def test_a_restart_is_worth_its_time(seconds, settled, now, logged):
    limit = RecyclePolicy(100 * MIB)
    limit.started(50 * MIB, seconds)
    now[0] += settled - 1
    assert not limit.exceeded(100 * MIB)
    assert not logged
    assert not limit.exceeded(120 * MIB)
    assert limit.bytes == 150 * MIB
    assert not limit.exceeded(160 * MIB)
    assert limit.bytes == 200 * MIB
    assert len(logged) == 1
    now[0] += 1
    assert not limit.exceeded(200 * MIB)
    assert limit.exceeded(201 * MIB)
    limit.started(50 * MIB, seconds)
    assert limit.bytes == 100 * MIB, "the next process has its own"


def test_a_new_process_is_replaced_all_the_same_before_the_kernel_ends_it(monkeypatch):
    monkeypatch.setattr("batchvl.serving.recycle.memory", lambda: 1000)
    limit = RecyclePolicy(100)
    limit.started(50, 1.0)
    assert not limit.exceeded(890)
    limit.started(50, 1.0)
    assert limit.exceeded(901)
