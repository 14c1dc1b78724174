"""Several engines that share the rows: who is handed which, and what the end of one means for the others."""

import asyncio
import os
import re
import signal
from contextlib import suppress
from functools import partial

import msgspec
import pytest

from batchvl.errors import EngineLost, EngineUnavailable
from batchvl.serving import exits as death
from batchvl.serving.exits import EngineExited
from batchvl.serving.process import EngineProcess
from tests.runner.running import children
from tests.serving.supervised import process_of, request, supervised


@pytest.fixture
def engines(tmp_path, logged):
    return partial(supervised, tmp_path / "engine.log", replicas=3)


@pytest.fixture
def handed(monkeypatch):
    """The lists that were handed over: the process's id and the rows' numbers."""
    found = []
    infer = EngineProcess.infer

    def listen(process, requests):
        found.append((process.pid, [request.row for request in requests]))
        infer(process, requests)

    monkeypatch.setattr(EngineProcess, "infer", listen)
    return found


async def all_up(engines):
    while not all(feed.is_open for feed in engines._queue.feeds):
        await asyncio.sleep(0.01)
    return [process_of(engines, number).pid for number in range(3)]


async def ask(engines, *rows):
    return await asyncio.gather(*(engines.answer(request(row)) for row in rows), return_exceptions=True)


async def test_rows_go_to_the_one_that_holds_the_fewest(engines, handed):
    async with engines(delay=60, rows=8) as e:
        first, second, third = await all_up(e)
        asked = asyncio.create_task(ask(e, *range(40)))
        while e.held < 24:
            await asyncio.sleep(0.01)
        lists = [(pid, len(rows)) for pid, rows in handed]
        assert lists == 2 * [(first, 4), (second, 4), (third, 4)]
        assert e.held == 24, "each has its eight, and sixteen wait"
        assert all(e.holds(row) for row in range(24))
        assert not any(e.holds(row) for row in range(24, 40))
    await asked


async def test_every_row_is_answered_once(engines, handed):
    async with engines(delay=0.005, spread=0.03) as e:
        await all_up(e)
        answers = await ask(e, *range(300))
        assert e.info.replicas == 3
    assert [answer.texts for answer in answers] == [(f"row {n}",) for n in range(300)]
    assert sorted(row for _, rows in handed for row in rows) == list(range(300))
    assert len({pid for pid, _ in handed}) == 3


async def test_rows_do_not_wait_for_the_last_to_be_up(engines, monkeypatch):
    change(monkeypatch, 2, start_delay=60)
    async with engines() as e:
        assert [answer.texts for answer in await ask(e, 1, 2)] == [("row 1",), ("row 2",)]
        assert not e._queue.feeds[2].is_open


def change(monkeypatch, which, **options):
    """Has one replica's processes behave otherwise: the first, its successors aside, or one that is started later."""
    begun = []
    opened = EngineProcess.open

    async def open_(process, spec, surroundings):
        begun.append(process)
        if len(begun) == which + 1:
            spec = msgspec.structs.replace(spec, options={**spec.options, **options})
        await opened(process, spec, surroundings)

    monkeypatch.setattr(EngineProcess, "open", open_)


async def test_while_one_is_started_again_the_others_go_on(engines, logged, tmp_path):
    async with engines(delay=0.02, start_delay=0.5) as e:
        first, second, third = await all_up(e)
        asked = [asyncio.create_task(e.answer(request(row))) for row in range(120)]
        while e._queue.answers < 12:
            await asyncio.sleep(0.001)
        os.kill(second, signal.SIGKILL)
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert not e._queue.feeds[1].is_open, "all were answered before it was up"
        died = [row for row, answer in enumerate(answers) if isinstance(answer, EngineExited)]
        assert 0 < len(died) <= 16
        assert all(answers[row].texts == (f"row {row}",) for row in range(120) if row not in died)
        while not e._queue.feeds[1].is_open:
            await asyncio.sleep(0.01)
        assert [answer.texts for answer in await ask(e, *died)] == [(f"row {row}",) for row in died]
        assert (e.deaths, e.restarts) == (1, 0)
        assert [process_of(e, number).pid for number in (0, 2)] == [first, third]
    assert logged[0] == f"the engine on GPU 1 was killed by SIGKILL with {len(died)} rows in it; it is started again"
    assert f"note: its last words are in {tmp_path}/engine-gpu1.log" in logged[1]
    assert re.fullmatch(r"the engine on GPU 1 is up again, after \d\.\d s", logged[-1])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine-gpu1.log", "engine-gpu2.log", "engine.log"]


async def test_a_row_that_one_hangs_over_is_its_own_affair(engines):
    async with engines(hang_on=[7], hang_timeout=0.6, batch_size=1, rows=1) as e:
        pids = await all_up(e)
        answers = await ask(e, *range(30))
        assert isinstance(answers[7], EngineExited)
        assert "no progress for 0.6 s" in str(answers[7])
        assert [answers[n].texts for n in range(30) if n != 7] == [(f"row {n}",) for n in range(30) if n != 7]
        await all_up(e)
        assert sum(process_of(e, number).pid != pid for number, pid in enumerate(pids)) == 1


async def test_suspects_are_one_replicas_alone_the_one_that_died_last(engines, handed):
    async with engines(die_on=[9]) as e:
        first, second, third = await all_up(e)
        await ask(e, *range(12, 24))
        with suppress(ProcessLookupError):
            os.kill(third, signal.SIGKILL)
        while not e.deaths:
            await asyncio.sleep(0.01)
        handed.clear()
        for _ in range(2):
            with e.alone():
                [died] = await ask(e, 9)
                assert died.answered == 0, "so nothing else can have done it"
        with e.alone():
            assert [answer.texts for answer in await ask(e, 1, 2, 3, 4, 5)] == [(f"row {n}",) for n in range(1, 6)]
        assert {pid for pid, _ in handed} & {first, second, third} == set()
        assert [process_of(e, number).pid for number in (0, 1)] == [first, second]


async def test_one_that_is_lost_leaves_the_run_to_the_others(engines, logged, monkeypatch):
    change(monkeypatch, 1, refuse="that it will not")
    async with engines() as e:
        while not any(replica.is_over for replica in e._replicas):
            await asyncio.sleep(0.01)
        answers = await ask(e, *range(50))
        assert [answer.texts for answer in answers] == [(f"row {n}",) for n in range(50)]
        assert e.deaths == 0
    [line] = logged
    assert re.fullmatch(r"the engine on GPU 1 is lost, and the run goes on with 2 of 3: .*that it will not", line)


async def test_one_that_finds_no_room_to_start_again_is_tried_and_then_lost(engines, logged, tmp_path, monkeypatch):
    monkeypatch.setattr(death, "REFUSED_SECONDS", 0.01)
    full = tmp_path / "full"
    async with engines(unavailable=str(full)) as e:
        _, second, third = await all_up(e)
        await ask(e, 1)
        full.write_text("no memory")
        os.kill(second, signal.SIGKILL)
        while not e._replicas[1].is_over:
            await asyncio.sleep(0.01)
            assert all(isinstance(answer.texts, tuple) for answer in await ask(e, 1, 2, 3))
        assert e.deaths == 5
        with e.alone():
            assert (await ask(e, 4))[0].texts == ("row 4",)
        full.unlink()
        os.kill(third, signal.SIGKILL)
        while e.deaths < 6 or not e._queue.feeds[2].is_open:
            await asyncio.sleep(0.01)
        assert len(await ask(e, *range(30))) == 30
    refusals = [line for line in logged if "refuses" in line and "tried again" in line]
    assert len(refusals) == 3
    assert sum("is lost, and the run goes on with 2 of 3: the engine died 5 times" in line for line in logged) == 1


async def test_with_the_last_one_the_run_ends(engines):
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


async def test_all_that_refuse_from_the_start_are_a_refusal(engines, tmp_path):
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


async def test_two_deaths_of_one_while_all_start_are_its_own_affair(engines, logged):
    async with engines(start_delay=1.5) as e:
        for deaths in range(2):
            while (process := e._replicas[2]._process) is None or process.gone or e.deaths < deaths:
                await asyncio.sleep(0.01)
            os.kill(process.pid, signal.SIGSEGV)
            while e.deaths == deaths:
                await asyncio.sleep(0.01)
        assert [answer.texts for answer in await ask(e, 1, 2)] == [("row 1",), ("row 2",)]
        assert e._replicas[2].is_over
    lost = "the engine on GPU 2 is lost, and the run goes on with 2 of 3: the engine died 2 times"
    assert logged[-1].startswith(lost)


async def test_they_are_all_of_one_model(engines, tmp_path, logged, monkeypatch):
    hub = tmp_path / "hub"
    hub.write_text("first words")
    async with engines(hub=str(hub)) as e:
        _, second, _ = await all_up(e)
        await ask(e, 1)
        hub.write_text("second sentences")
        os.kill(second, signal.SIGKILL)
        while not e._replicas[1].is_over:
            await asyncio.sleep(0.01)
        assert [answer.texts for answer in await ask(e, 2, 3)] == [("row 2",), ("row 3",)]
        assert e.info.revision == "first"
    assert any("goes on with 2 of 3: the model has changed since the run began" in line for line in logged)


async def test_a_kill_ends_them_all(engines):
    async with engines(delay=60, rows=4) as e:
        await all_up(e)
        asked = asyncio.create_task(ask(e, *range(20)))
        while e.held < 12:
            await asyncio.sleep(0.01)
        e.kill("the run is stopping")
        assert all(isinstance(answer, EngineExited) for answer in await asyncio.wait_for(asked, 10))
        with pytest.raises(EngineLost):
            await e.answer(request(99))
    assert not children()


async def test_what_counts_is_their_mean(engines):
    async with engines(delay=0.4, batch_size=1) as e:
        await all_up(e)
        for row in range(4):
            await ask(e, row)
        assert 1.6 <= e.seconds < 2.2
        assert e.wait_share > 0.3, "two of three had nothing to do until the last list, which is told a moment late"
        assert e.idle_since is not None
        row = asyncio.create_task(e.answer(request(9)))
        await asyncio.sleep(0.1)
        assert e.idle_since is None
        await row
