"""The supervised engine against a real child process that dies, hangs, refuses and delays to order."""

import asyncio
import os
import re
import signal
from functools import partial

import pytest

from batchvl.engines.process import EngineDied
from batchvl.errors import EngineLost, OptionError
from tests.engines.supervised import request, supervised


@pytest.fixture
def said():
    return []


@pytest.fixture
def engine(tmp_path, said):
    return partial(supervised, tmp_path / "engine.log", said)


async def test_every_row_gets_its_own_answer_out_of_order(engine):
    async with engine(delay=0.01, spread=0.05) as e:
        answers = await asyncio.gather(*(e.answer(request(i, f"and {i}?")) for i in range(50)))
    assert [a.texts for a in answers] == [(f"row {i}", f"and {i}?") for i in range(50)]


async def test_a_refusal_keeps_its_class_and_words(engine):
    with pytest.raises(OptionError, match="no such thing"):
        async with engine(refuse="no such thing") as e:
            await e.started()


async def test_an_unknown_engine_option_is_refused_before_start(engine):
    with pytest.raises(OptionError, match="velocity"):
        async with engine(velocity=3):
            pass


async def test_a_death_gives_back_what_was_held_and_the_rest_goes_on(engine):
    async with engine(die_on=[7]) as e:
        await e.answer(request(1000))
        answers = await asyncio.gather(*(e.answer(request(i)) for i in range(20)), return_exceptions=True)
        assert (e.deaths, e.restarts) == (1, 0)
    died = [i for i, a in enumerate(answers) if isinstance(a, EngineDied)]
    assert 7 in died
    assert set(died) < set(range(20))
    assert all(answers[i].texts == (f"row {i}",) for i in range(20) if i not in died)
    assert "SIGKILL" in str(answers[7])


async def test_two_deaths_before_the_first_answer_are_final_and_show_the_last_words(engine):
    async with engine(die_on=[0]) as e:
        with pytest.raises(EngineDied):
            await e.answer(request(0))
        with pytest.raises((EngineDied, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match=r"died 2 times before its first answer.*SIGKILL"):
            await e.answer(request(1))


async def test_five_deaths_in_vain_are_final_but_halving_counts_as_progress(engine):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))
        for _ in range(4):
            with pytest.raises(EngineDied):
                await e.answer(request(0))
        e.halved()
        for _ in range(4):
            with pytest.raises(EngineDied):
                await e.answer(request(0))
        with pytest.raises((EngineDied, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="5 times without an answer"):
            await e.answer(request(1))


async def test_a_hung_process_leaves_its_stacks_and_is_replaced(engine, tmp_path, said):
    async with engine(hang_on=[3], hang_timeout=0.6) as e:
        await e.answer(request(1))
        with pytest.raises(EngineDied, match=r"no progress for 0\.6 s"):
            await e.answer(request(3))
        assert (await e.answer(request(4))).texts == ("row 4",)
    assert "Current thread" in (tmp_path / "engine.log").read_text()
    hangs, ended = (line for line in said if line.startswith("the engine ") and "up again" not in line)
    assert (
        hangs
        == f"the engine hangs: no progress for 0.6 s (--hang-timeout); where it stands is in {tmp_path}/engine.log"
    )
    assert ended == "the engine was ended, having hung, with 1 row in it; it is started again"


async def test_a_row_past_its_time_is_aborted_and_the_others_stay(engine):
    async with engine(delay=0.8, row_timeout=0.2) as e:
        response = await e.answer(request(1))
    assert response.failure is not None
    assert response.failure.code == "row_timeout"
    assert "--row-timeout" in response.failure.message


async def test_cancelling_a_row_waits_until_the_engine_lets_go(engine):
    async with engine(delay=5) as e:
        await e.started()
        task = asyncio.create_task(e.answer(request(1)))
        while not e.holds(1):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 2)
        assert not e.holds(1), "its extent is free from now on"


async def test_killed_from_outside_it_comes_back_and_tells(engine, tmp_path, said):
    async with engine() as e:
        await e.answer(request(1))
        os.kill(e._process.pid, signal.SIGKILL)
        while not e.deaths:
            await asyncio.sleep(0.01)
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert e.deaths == 1
    died, where, advice, up = said
    assert died == "the engine was killed by SIGKILL with 0 rows in it; it is started again"
    assert where == f"note: its last words are in {tmp_path}/engine.log"
    assert "--mem" in advice
    assert re.fullmatch(r"the engine is up again, after \d+\.\d s", up)


async def test_a_death_before_it_is_up_is_told_as_one(engine, said):
    async with engine(start_delay=60) as e:
        os.kill(e._process.pid, signal.SIGSEGV)
        while not e.deaths:
            await asyncio.sleep(0.01)
    assert said[0] == "the engine was killed by SIGSEGV while it was starting; it is started again"


async def test_no_process_outlives_the_engine(engine):
    async with engine(delay=60) as e:
        await e.started()
        pid = e._process.pid
        task = asyncio.create_task(e.answer(request(1)))
        await asyncio.sleep(0.1)
        assert not task.done()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineDied):
        await task


async def test_a_process_that_cannot_be_started_again_ends_it_with_the_reason(engine, monkeypatch):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))

        def refuse(*arguments):
            raise OSError(11, "no more processes")

        monkeypatch.setattr("batchvl.engines.process.spawn", refuse)
        with pytest.raises(EngineDied):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="no more processes"):
            await e.answer(request(1))
        monkeypatch.undo()


async def test_a_hung_process_that_dies_by_itself_is_one_death(engine, monkeypatch):
    async with engine(hang_on=[3], hang_timeout=0.6) as e:
        await e.answer(request(1))
        monkeypatch.setattr(type(e._process), "dump_stacks", lambda process: process._process.kill())
        with pytest.raises(EngineDied):
            await e.answer(request(3))
        assert (await e.answer(request(4))).texts == ("row 4",)
        await asyncio.sleep(0.6)  # in which the watch wakes up, and finds another process
        assert e.deaths == 1


async def test_after_a_kill_nobody_waits(engine):
    async with engine(delay=60) as e:
        await e.started()
        task = asyncio.create_task(e.answer(request(1)))
        while not e.holds(1):
            await asyncio.sleep(0.01)
        e.kill("the run is stopping")
        with pytest.raises(EngineDied):
            await task
        with pytest.raises(EngineLost):
            await e.answer(request(2))
