"""An engine whose memory grows is replaced between rows, without any effect on the answers."""

import asyncio
import re

import pytest

from batchvl.hardware.limits import memory
from batchvl.serving import recycle
from batchvl.serving.exits import EngineExited
from batchvl.serving.recycle import RecyclePolicy, format_bytes
from batchvl.serving.replica import Status
from tests.runner.running import children, questions, responses, run
from tests.serving.supervised import eventually, process_of, request, supervised

MIB = 2**20


@pytest.fixture
def watched(monkeypatch):
    """Memory is checked often."""
    monkeypatch.setattr("batchvl.serving.replica.MEMORY_SECONDS", 0.02)


@pytest.fixture
def recycled(monkeypatch, watched):
    """Processes are recycled however new they are."""
    monkeypatch.setattr(recycle, "MIN_UP_STARTS", 0)
    monkeypatch.setattr(recycle, "MIN_UP_SECONDS", 0)


async def test_a_grown_engine_is_replaced_and_every_row_sent_once(recycled, batches, tmp_path, logged):
    async with supervised(tmp_path / "log", grow=MIB, delay=0.01, spread=0.05, engine_memory=60 * MIB) as engine:
        answers = await asyncio.gather(*(engine.answer(request(i)) for i in range(300)))
        assert engine.deaths == 0
        assert 2 <= engine.recycled <= 8
        waited = engine.wait_share * engine.seconds
    assert [a.texts for a in answers] == [(f"row {i}",) for i in range(300)]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(300))
    assert len({batch.pid for batch in batches}) == engine.recycled + 1
    pattern = r"the engine uses \d+ MiB of memory, more than 60 MiB \(--engine-memory\): restarting it once it has"
    assert sum(bool(re.match(pattern, line)) for line in logged) in (engine.recycled, engine.recycled + 1)
    restarts = [float(seconds) for line in logged for seconds in re.findall(r"up again after ([\d.]+) s", line)]
    assert len(restarts) == engine.recycled
    assert waited < sum(restarts), "a restart is no wait for rows"


async def test_memory_of_forks_counts(tmp_path):
    async with supervised(tmp_path / "alone") as alone, supervised(tmp_path / "log", forks=3) as engine:
        await alone.started()
        await engine.started()
        assert await process_of(engine).memory() > 2 * await process_of(alone).memory()


async def test_a_process_that_needs_that_much_from_the_start_is_not_recycled(recycled, tmp_path, logged):
    async with supervised(tmp_path / "log", engine_memory=MIB) as engine:
        await engine.answer(request(0))
        await asyncio.sleep(0.3)
        assert (await engine.answer(request(1))).texts == ("row 1",)
        assert (engine.recycled, engine.deaths) == (0, 0)
    [line] = logged
    pattern = (
        r"the engine uses \d+ MiB of memory right after its start: "
        r"raising --engine-memory from 1 MiB to \d+ MiB for it"
    )
    assert re.fullmatch(pattern, line)


async def test_a_row_past_its_deadline_does_not_delay_the_restart(recycled, tmp_path):
    async with supervised(tmp_path / "log", slow_every=7, row_timeout=2.0, grow=80 * MIB, engine_memory=60 * MIB) as e:
        slow, quick = await asyncio.gather(e.answer(request(7)), e.answer(request(1)))
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert (e.recycled, e.deaths) == (1, 0)
    assert quick.texts == ("row 1",)
    assert slow.failure.code == "row_timeout"


async def test_a_hang_while_it_drains_is_a_death(recycled, tmp_path, logged):
    hang = {"hang_on": [3], "hang_timeout": 0.9, "batch_size": 1}
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB, **hang) as engine:
        answered, hung = await asyncio.gather(*map(engine.answer, map(request, (1, 3))), return_exceptions=True)
        assert answered.texts == ("row 1",)
        assert isinstance(hung, EngineExited)
        assert "no progress for 0.9 s" in str(hung)
        assert (engine.deaths, engine.recycled) == (1, 0)
        assert (await engine.answer(request(2))).texts == ("row 2",)
    assert re.search(r"restarting it once it has answered the (1 row|2 rows) in flight$", logged[0])


async def test_the_run_may_end_while_the_engine_is_replaced(recycled, tmp_path):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        await engine.answer(request(1))
        while engine.replicas[0].status is not Status.RESTARTING:
            await asyncio.sleep(0)
    assert not children()


async def test_a_kill_while_the_engine_is_replaced_is_final(recycled, tmp_path):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        await engine.answer(request(1))
        while engine.replicas[0].status is not Status.RESTARTING:
            await asyncio.sleep(0)
        waiting = asyncio.create_task(engine.answer(request(2)))
        await asyncio.sleep(0)
        engine.kill("the run is stopping")
        with pytest.raises(EngineExited):
            await waiting
        assert (engine.recycled, engine.deaths) == (0, 0)
        await eventually(lambda: engine.replicas[0].status is Status.CLOSED)


def test_a_run_counts_restarts(recycled, tmp_path):
    summary = run(
        questions(tmp_path / "m.jsonl", 200), {"grow": MIB, "delay": 0.02}, batch_size=4, engine_memory="60MiB"
    )
    assert responses(summary) == [f"q {n}" for n in range(200)]
    assert (summary.exit_code, summary.engine_deaths) == (0, 0)
    assert summary.engine_restarts >= 1
    assert "because its memory had grown" in str(summary)
    assert not children()


async def test_memory_that_grows_soon_after_the_start_raises_the_limit(watched, tmp_path, logged):
    async with supervised(tmp_path / "log", grow=80 * MIB, engine_memory=60 * MIB) as engine:
        for row in range(4):
            await engine.answer(request(row))
            await asyncio.sleep(0.2)
        assert (engine.recycled, engine.deaths) == (0, 0)
    [line] = logged
    assert re.fullmatch(r".* \d+ MiB of memory soon after its start: .* from 60 MiB to \d+ MiB for it", line)


@pytest.fixture
def now(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr("batchvl.serving.recycle.time.monotonic", lambda: clock[0])
    return clock


def test_the_limit_is_raised_at_the_start(logged):
    policy = RecyclePolicy(100 * MIB)
    policy.on_start(50 * MIB, 1)
    assert (policy.limit, logged) == (100 * MIB, [])
    policy.on_start(160 * MIB, 1)
    assert policy.limit == 200 * MIB
    policy.on_start(120 * MIB, 1)
    assert policy.limit == 150 * MIB
    [line] = logged
    assert "160 MiB of memory right after its start: raising --engine-memory from 100 MiB to 200 MiB" in line
    assert RecyclePolicy(None).limit == memory() * 3 // 4
    assert format_bytes(3 * 2**29) == "1.5 GiB"


@pytest.mark.parametrize(("seconds", "settled"), [(2, 300), (60, 600)])
def test_a_restart_is_worth_its_time(seconds, settled, now, logged):
    policy = RecyclePolicy(100 * MIB)
    policy.on_start(50 * MIB, seconds)
    now[0] += settled - 1
    assert not policy.exceeded(100 * MIB)
    assert not logged
    assert not policy.exceeded(120 * MIB)
    assert policy.limit == 150 * MIB
    assert not policy.exceeded(160 * MIB)
    assert policy.limit == 200 * MIB
    assert len(logged) == 1
    now[0] += 1
    assert not policy.exceeded(200 * MIB)
    assert policy.exceeded(201 * MIB)
    policy.on_start(50 * MIB, seconds)
    assert policy.limit == 100 * MIB, "the next process starts with the requested limit"


def test_a_new_process_is_replaced_before_the_kernel_kills_it(monkeypatch):
    monkeypatch.setattr("batchvl.serving.recycle.memory", lambda: 1000)
    policy = RecyclePolicy(100)
    policy.on_start(50, 1.0)
    assert not policy.exceeded(890)
    policy.on_start(50, 1.0)
    assert policy.exceeded(901)
