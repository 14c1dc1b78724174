"""Several replicas that share the rows: which one receives which row, and what the end of one means for the others."""

import asyncio
import os
import re
import signal
from contextlib import suppress
from functools import partial

import msgspec
import pytest

from batchvl.errors import EngineLost, EngineUnavailable
from batchvl.serving import exits
from batchvl.serving.exits import EngineExited
from batchvl.serving.process import EngineProcess
from batchvl.serving.replica import Status
from tests.runner.running import PATIENCE, children
from tests.serving.supervised import ask, eventually, is_up, process_of, request, supervised
from tests.timing import scaled


@pytest.fixture
def engines(tmp_path, logged):
    return partial(supervised, tmp_path / "engine.log", replicas=3)


async def all_up(engines):
    """Wait until all replicas are up. Return their process ids."""
    await eventually(lambda: all(is_up(engines, number) for number in range(3)))
    return [process_of(engines, number).pid for number in range(3)]


async def test_rows_go_to_the_replica_with_the_fewest(engines, batches):
    async with engines(delay=60, rows=8) as e:
        first, second, third = await all_up(e)
        asked = asyncio.create_task(ask(e, *range(40)))
        await eventually(lambda: e.in_flight >= 24)
        assert [(batch.pid, len(batch.rows)) for batch in batches] == 2 * [(first, 4), (second, 4), (third, 4)]
        assert e.in_flight == 24, "each has its eight, and sixteen are pending"
        assert all(e.holds(row) for row in range(24))
        assert not any(e.holds(row) for row in range(24, 40))
    await asked


async def test_every_row_is_answered_once(engines, batches):
    async with engines(delay=0.005, spread=0.03) as e:
        await all_up(e)
        answers = await ask(e, *range(300))
        assert e.info.replicas == 3
    assert [answer.texts for answer in answers] == [(f"row {n}",) for n in range(300)]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(300))
    assert len({batch.pid for batch in batches}) == 3


async def test_rows_do_not_wait_for_the_last_replica_to_be_up(engines, monkeypatch):
    change(monkeypatch, 2, start_delay=60)
    async with engines() as e:
        assert [answer.texts for answer in await ask(e, 1, 2)] == [("row 1",), ("row 2",)]
        assert e.replicas[2].status is Status.STARTING


def change(monkeypatch, which, **options):
    """Start the process that is started as number `which`, from 0, with other options of the fake engine."""
    launched = []
    original_open = EngineProcess.open

    async def open_(process, spec, context):
        launched.append(process)
        if len(launched) == which + 1:
            spec = msgspec.structs.replace(spec, options={**spec.options, **options})
        await original_open(process, spec, context)

    monkeypatch.setattr(EngineProcess, "open", open_)


async def test_while_one_is_restarted_the_others_continue(engines, logged, tmp_path):
    async with engines(delay=0.02, start_delay=0.5) as e:
        first, second, third = await all_up(e)
        asked = [asyncio.create_task(e.answer(request(row))) for row in range(120)]
        while e.answers < 12:
            await asyncio.sleep(0.001)
        os.kill(second, signal.SIGKILL)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert not is_up(e, 1), "all were answered before it was up"
        died = [row for row, answer in enumerate(answers) if isinstance(answer, EngineExited)]
        assert 0 < len(died) <= 16
        assert all(answers[row].texts == (f"row {row}",) for row in range(120) if row not in died)
        await eventually(lambda: is_up(e, 1))
        assert [answer.texts for answer in await ask(e, *died)] == [(f"row {row}",) for row in died]
        assert (e.deaths, e.recycled) == (1, 0)
        assert [process_of(e, number).pid for number in (0, 2)] == [first, third]
    assert logged[0] == f"the engine on GPU 1 was killed by SIGKILL with {len(died)} rows in flight; restarting it"
    assert f"see {tmp_path}/engine-gpu1.log for its last output" in logged[1]
    assert re.fullmatch(r"the engine on GPU 1 is up again after \d\.\d s", logged[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-gpu1.log", "engine-gpu2.log", "engine.log"]


async def test_a_row_over_which_one_hangs_does_not_affect_the_others(engines):
    async with engines(hang_on=[7], hang_timeout=0.6, batch_size=1, rows=1) as e:
        pids = await all_up(e)
        answers = await ask(e, *range(30))
        assert isinstance(answers[7], EngineExited)
        assert "no progress for 0.6 s" in str(answers[7])
        assert [answers[n].texts for n in range(30) if n != 7] == [(f"row {n}",) for n in range(30) if n != 7]
        await all_up(e)
        assert sum(process_of(e, number).pid != pid for number, pid in enumerate(pids)) == 1


async def test_suspects_go_to_the_replica_that_died_last(engines, batches):
    async with engines(die_on=[9]) as e:
        first, second, third = await all_up(e)
        await ask(e, *range(12, 24))
        with suppress(ProcessLookupError):
            os.kill(third, signal.SIGKILL)
        await eventually(lambda: e.deaths)
        batches.clear()
        for _ in range(2):
            with e.single_replica():
                [died] = await ask(e, 9)
                assert died.answered == 0, "so nothing else can be to blame"
        with e.single_replica():
            assert [answer.texts for answer in await ask(e, 1, 2, 3, 4, 5)] == [(f"row {n}",) for n in range(1, 6)]
        assert {batch.pid for batch in batches} & {first, second, third} == set()
        assert [process_of(e, number).pid for number in (0, 1)] == [first, second]


async def test_a_replica_that_fails_leaves_the_run_to_the_others(engines, logged, monkeypatch):
    change(monkeypatch, 1, refuse="that it will not")
    async with engines() as e:
        await eventually(lambda: e.replicas[1].status is Status.FAILED)
        answers = await ask(e, *range(50))
        assert [answer.texts for answer in answers] == [(f"row {n}",) for n in range(50)]
        assert e.deaths == 0
    [line] = logged
    assert re.fullmatch(r"the engine on GPU 1 failed; continuing with 2 of 3 replicas: .*that it will not", line)


async def test_a_replica_without_memory_for_a_restart_is_retried_and_then_fails(engines, logged, tmp_path, monkeypatch):
    monkeypatch.setattr(exits, "REFUSED_SECONDS", 0.01)
    full = tmp_path / "full"
    async with engines(unavailable=str(full)) as e:
        _, second, third = await all_up(e)
        await ask(e, 1)
        full.write_text("no memory")
        os.kill(second, signal.SIGKILL)
        while not e.replicas[1].is_over:
            await asyncio.sleep(0.01)
            assert all(isinstance(answer.texts, tuple) for answer in await ask(e, 1, 2, 3))
        assert e.deaths == 5
        with e.single_replica():
            assert (await ask(e, 4))[0].texts == ("row 4",)
        full.unlink()
        os.kill(third, signal.SIGKILL)
        await eventually(lambda: e.deaths >= 6 and is_up(e, 2))
        assert len(await ask(e, *range(30))) == 30
    refusals = [line for line in logged if "refuses" in line and "; restarting it in" in line]
    assert len(refusals) == 3
    failed = "failed; continuing with 2 of 3 replicas: the engine died 5 times"
    assert sum(failed in line for line in logged) == 1


async def test_the_run_ends_with_the_last_replica(engines):
    async with engines(die_on=[0]) as e:
        await all_up(e)
        await ask(e, 1)
        for _ in range(14):
            [died] = await ask(e, 0)
            assert isinstance(died, EngineExited)
        with pytest.raises((EngineExited, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="died 5 times without an answer"):
            await e.answer(request(1))
    assert not children()


async def test_all_refusing_from_the_start_is_a_usage_error(engines, tmp_path):
    full = tmp_path / "full"
    full.write_text("no memory")
    async with engines(unavailable=str(full)) as e:
        with pytest.raises(EngineUnavailable, match="no memory"):
            await e.started()
        with pytest.raises(EngineUnavailable, match="no memory"):
            await e.answer(request(1))
        assert e.deaths == 0


async def test_two_deaths_of_one_over_rows_before_any_answer_end_the_run(engines):
    async with engines(die_on=list(range(100))) as e:
        answers = await ask(e, *range(100))
        lost = [answer for answer in answers if isinstance(answer, EngineLost)]
        assert lost
        assert re.search(r"died 2 times before its first answer.*SIGKILL", str(lost[0]))
        assert 2 <= e.deaths <= 4
        assert all(isinstance(answer, EngineExited | EngineLost) for answer in answers)
        with pytest.raises(EngineLost):
            await e.answer(request(200))


async def test_two_deaths_of_one_while_all_start_do_not_end_the_run(engines, logged):
    async with engines(start_delay=1.5) as e:
        for deaths in range(2):
            while (process := e.replicas[2].process) is None or process.gone or e.deaths < deaths:
                await asyncio.sleep(0.01)
            os.kill(process.pid, signal.SIGSEGV)
            await eventually(lambda seen=deaths: e.deaths != seen)
        assert [answer.texts for answer in await ask(e, 1, 2)] == [("row 1",), ("row 2",)]
        assert e.replicas[2].status is Status.FAILED
    failed = "the engine on GPU 2 failed; continuing with 2 of 3 replicas: the engine died 2 times"
    assert logged[-1].startswith(failed)


async def test_all_replicas_serve_one_model(engines, tmp_path, logged, monkeypatch):
    hub = tmp_path / "hub"
    hub.write_text("first words")
    async with engines(hub=str(hub)) as e:
        _, second, _ = await all_up(e)
        await ask(e, 1)
        hub.write_text("second sentences")
        os.kill(second, signal.SIGKILL)
        await eventually(lambda: e.replicas[1].is_over)
        assert [answer.texts for answer in await ask(e, 2, 3)] == [("row 2",), ("row 3",)]
        assert e.info.revision == "first"
    assert any("with 2 of 3 replicas: the model has changed since the run began" in line for line in logged)


async def test_a_kill_ends_them_all(engines):
    async with engines(delay=60, rows=4) as e:
        await all_up(e)
        asked = asyncio.create_task(ask(e, *range(20)))
        await eventually(lambda: e.in_flight >= 12)
        e.kill("the run is stopping")
        assert all(isinstance(answer, EngineExited) for answer in await asyncio.wait_for(asked, PATIENCE))
        with pytest.raises(EngineLost):
            await e.answer(request(99))
    assert not children()


async def test_a_row_fails_only_once_its_own_process_has_exited(engines):
    """Its tensors are released then: no process may still read them. One has died before, with no answer at all yet."""
    exited = {}

    async with engines(delay=60, rows=4) as e:

        async def answer(row):
            with suppress(EngineExited):
                await e.answer(request(row))
            exited[row] = holder[row].exited.done()

        first, _, _ = await all_up(e)
        rows = [asyncio.create_task(answer(row)) for row in range(12)]
        await eventually(lambda: e.in_flight == 12)
        holder = {row: r.process for r in e.replicas for row in range(12) if row in r.client.in_flight}
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: e.deaths == 1 and is_up(e, 0))
        rows.append(asyncio.create_task(answer(12)))
        await eventually(lambda: e.holds(12))
        holder[12] = process_of(e)
        e.kill("the run is stopping")
        await asyncio.wait_for(asyncio.gather(*rows), PATIENCE)
    assert exited == dict.fromkeys(range(13), True)


async def test_seconds_and_waits_are_the_replicas_mean(engines):
    async with engines(delay=0.4, batch_size=1) as e:
        await all_up(e)
        for row in range(4):
            await ask(e, row)
        assert 1.6 <= e.seconds < 1.6 + scaled(0.6)
        assert e.wait_share > 0.3, "two of three had nothing to do until the last batch, and reported it a moment later"
        assert e.idle_since is not None
        row = asyncio.create_task(e.answer(request(9)))
        await eventually(lambda: e.in_flight)
        assert e.idle_since is None
        await row
