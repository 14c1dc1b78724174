"""An engine that is kept alive, against a real child process that dies, hangs, refuses and delays to order."""

import asyncio
import os
import re
import signal
import time
from functools import partial

import msgspec
import pytest

from batchvl.errors import EngineLost, EngineUnavailable, OptionError
from batchvl.serving import exits as death
from batchvl.serving import process
from batchvl.serving.exits import EngineExited, Unkillable
from tests.runner.running import children, wait_until
from tests.serving.supervised import process_of, request, supervised


@pytest.fixture
def engine(tmp_path, logged):
    return partial(supervised, tmp_path / "engine.log")


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
    died = [i for i, a in enumerate(answers) if isinstance(a, EngineExited)]
    assert 7 in died
    assert set(died) < set(range(20))
    assert all(answers[i].texts == (f"row {i}",) for i in range(20) if i not in died)
    assert "SIGKILL" in str(answers[7])


async def test_two_deaths_before_the_first_answer_are_final_and_show_the_last_words(engine):
    async with engine(die_on=[0]) as e:
        with pytest.raises(EngineExited):
            await e.answer(request(0))
        with pytest.raises((EngineExited, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match=r"died 2 times before its first answer.*SIGKILL"):
            await e.answer(request(1))


async def test_five_deaths_in_vain_are_final_but_halving_counts_as_progress(engine):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))
        for _ in range(4):
            with pytest.raises(EngineExited):
                await e.answer(request(0))
        e.halved()
        for _ in range(4):
            with pytest.raises(EngineExited):
                await e.answer(request(0))
        with pytest.raises((EngineExited, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="5 times without an answer"):
            await e.answer(request(1))


async def test_a_hung_process_leaves_its_stacks_and_is_replaced(engine, tmp_path, logged):
    async with engine(hang_on=[3], hang_timeout=0.6) as e:
        await e.answer(request(1))
        with pytest.raises(EngineExited, match=r"no progress for 0\.6 s"):
            await e.answer(request(3))
        assert (await e.answer(request(4))).texts == ("row 4",)
    assert "Current thread" in (tmp_path / "engine.log").read_text()
    hangs, ended = (line for line in logged if line.startswith("the engine ") and "up again" not in line)
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


async def test_killed_from_outside_it_comes_back_and_tells(engine, tmp_path, logged):
    async with engine() as e:
        await e.answer(request(1))
        os.kill(process_of(e).pid, signal.SIGKILL)
        while not e.deaths:
            await asyncio.sleep(0.01)
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert e.deaths == 1
    died, where, advice, up = logged
    assert died == "the engine was killed by SIGKILL with 0 rows in it; it is started again"
    assert where == f"note: its last words are in {tmp_path}/engine.log"
    assert "--mem" in advice
    assert re.fullmatch(r"the engine is up again, after \d+\.\d s", up)


async def test_a_death_before_it_is_up_is_told_as_one(engine, logged):
    async with engine(start_delay=60) as e:
        os.kill(process_of(e).pid, signal.SIGSEGV)
        while not e.deaths:
            await asyncio.sleep(0.01)
    assert logged[0] == "the engine was killed by SIGSEGV while it was starting; it is started again"


async def test_no_process_outlives_the_engine(engine):
    async with engine(delay=60) as e:
        await e.started()
        pid = process_of(e).pid
        task = asyncio.create_task(e.answer(request(1)))
        await asyncio.sleep(0.1)
        assert not task.done()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineExited):
        await task


async def test_a_process_that_cannot_be_started_again_ends_it_with_the_reason(engine, monkeypatch):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))

        def refuse(*arguments):
            raise OSError(11, "no more processes")

        monkeypatch.setattr("batchvl.serving.process.spawn", refuse)
        with pytest.raises(EngineExited):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="no more processes"):
            await e.answer(request(1))
        monkeypatch.undo()


async def test_a_hung_process_that_dies_by_itself_is_one_death(engine, monkeypatch):
    async with engine(hang_on=[3], hang_timeout=0.6) as e:
        await e.answer(request(1))
        monkeypatch.setattr(type(process_of(e)), "dump_stacks", lambda process: process._process.kill())
        with pytest.raises(EngineExited):
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
        with pytest.raises(EngineExited):
            await task
        with pytest.raises(EngineLost):
            await e.answer(request(2))


async def die(engine):
    """Has the process die, and waits until that is known."""
    deaths = engine.deaths
    os.kill(process_of(engine).pid, signal.SIGKILL)
    while engine.deaths == deaths:
        await asyncio.sleep(0.01)


async def test_a_process_that_loads_again_does_not_wait_for_rows(engine):
    async with engine(start_delay=1.5) as e:
        await e.started()
        assert e.idle_since is not None
        await asyncio.sleep(0.6)
        await e.answer(request(1))
        assert e.seconds < 0.5, "before the first list it is the intake that is slow"
        await asyncio.sleep(0.6)
        assert e.wait_share == 0, "of a wait after which no more rows come, nobody knows what for"
        await die(e)
        assert e.idle_since is None, "rows that wait for a retry are not what it waits for"
        await e.answer(request(2))
        up, waited = e.seconds, e.wait_share * e.seconds
        assert up < 1.4, "the second start is not in it"
        assert 0.3 < waited < up


async def test_waits_for_rows_are_counted_from_the_first_list_to_the_last(engine):
    async with engine(delay=0.5) as e:
        await e.started()
        await asyncio.sleep(0.5)
        for row in range(3):
            await e.answer(request(row))
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.5)
        assert 2.5 <= e.seconds < 3.5, "three answers, and the time between them"
        assert 0.8 < e.wait_share * e.seconds < 1.5, "twice half a second, and not the end's"


async def test_an_engine_that_always_has_rows_does_not_wait(engine):
    async with engine(delay=0.1) as e:
        await asyncio.gather(*(e.answer(request(row)) for row in range(120)))
        assert e.seconds > 0.6
        assert e.wait_share < 0.3


@pytest.fixture
def hub(tmp_path):
    path = tmp_path / "hub"
    path.write_text("first words")
    return path


async def test_a_process_started_again_is_of_the_same_revision(engine, hub):
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        hub.write_text("second words")
        await die(e)
        await e.answer(request(2))
        assert e.info.revision == "first"


@pytest.mark.parametrize("now", ["second words", "first sentences"])
async def test_another_model_answers_no_rows(now, engine, hub):
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        e._pin.spec = msgspec.structs.replace(e._pin.spec, revision=None)  # as for an engine that does not heed it
        hub.write_text(now)
        await die(e)
        with pytest.raises(EngineLost, match=r"the model has changed .* rows would be answered by another model"):
            await e.answer(request(2))
        assert e.info.revision == "first"


async def test_a_model_that_is_gone_ends_it(engine, hub):
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        hub.unlink()
        await die(e)
        with pytest.raises(EngineLost, match=r"could not be started again: .*no such model"):
            await e.answer(request(2))
        assert e.deaths == 1


@pytest.fixture
def full(tmp_path):
    """While it is there, a neighbour has the GPU's memory."""
    return tmp_path / "full"


async def test_an_engine_that_is_unavailable_at_first_is_refused(engine, full):
    full.write_text("no memory")
    async with engine(unavailable=str(full)) as e:
        with pytest.raises(EngineUnavailable, match="no memory"):
            await e.started()
        assert e.deaths == 0


async def test_a_refusal_to_start_again_may_pass(engine, full, logged, monkeypatch):
    monkeypatch.setattr(death, "REFUSED_SECONDS", 0.1)
    async with engine(unavailable=str(full)) as e:
        for _ in range(2):
            await e.answer(request(1))
            full.write_text("no memory\nhere is how it came to that")
            await die(e)
            while e.deaths % 3:
                await asyncio.sleep(0.01)
            full.unlink()
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert e.deaths == 6
    refusals = [line for line in logged if "refuses" in line]
    assert refusals == 2 * [
        "the engine refuses to start again: no memory; it is tried again in 0.1 s",
        "the engine refuses to start again: no memory; it is tried again in 0.2 s",
    ]


async def test_refusals_to_start_again_are_final_as_deaths_are(engine, full, monkeypatch):
    monkeypatch.setattr(death, "REFUSED_SECONDS", 0.01)
    async with engine(unavailable=str(full)) as e:
        await e.answer(request(1))
        full.write_text("no memory")
        await die(e)
        with pytest.raises(EngineLost, match=r"died 5 times without an answer in between: .* again: no memory"):
            await e.answer(request(2))
        assert e.deaths == 5


async def test_a_kill_ends_the_pause_after_a_refusal(engine, full):
    async with engine(unavailable=str(full)) as e:
        await e.answer(request(1))
        full.write_text("no memory")
        await die(e)
        while e.deaths < 2:
            await asyncio.sleep(0.01)
        row = asyncio.create_task(e.answer(request(2)))
        await asyncio.sleep(0.1)
        assert not row.done()
        e.kill("the run is stopping")
        with pytest.raises(EngineExited):
            await asyncio.wait_for(row, 2)
        assert not children()


@pytest.fixture
def unkillable(monkeypatch):
    """Signals do nothing; at a test's end the guardian ends the process."""
    started = []
    spawn = process.spawn

    def spy(*arguments):
        started.append(spawn(*arguments))
        return started[-1]

    monkeypatch.setattr(process, "spawn", spy)
    monkeypatch.setattr(process.EngineProcess, "_signal", lambda process, number: None)
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 0.5)
    yield
    [each] = started
    wait_until(lambda: each.poll() is not None)


LIVES_ON = (
    r"the engine process \d+ cannot be killed: it is in state S, 0\.5 s after SIGKILL, .* the node needs looking at"
)


async def test_a_hung_process_that_cannot_be_killed_ends_the_run(engine, unkillable, logged, monkeypatch):
    async with engine(stuck_on=[3], hang_timeout=0.2, batch_size=1, rows=1) as e:
        await e.answer(request(1))
        rows = [asyncio.create_task(e.answer(request(row))) for row in (3, 4)]
        lost = await asyncio.wait_for(asyncio.gather(*rows, return_exceptions=True), 10)
        assert [type(error) for error in lost] == [EngineLost, EngineLost], "no row is to blame"
        assert re.match(LIVES_ON, str(lost[0]))
        with pytest.raises(EngineLost, match="cannot be killed"):
            await e.answer(request(5))
        assert process_of(e)._process.poll() is None
        monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 60)
        since = time.monotonic()
    assert time.monotonic() - since < 10, "nothing waits for it any more"
    assert sum("hangs" in line for line in logged) == 1
    assert re.match(LIVES_ON, logged[-1])


async def test_a_process_that_cannot_be_killed_does_not_hold_up_the_end(engine, unkillable, logged):
    async with asyncio.timeout(10):
        async with engine(stuck_on=[3]) as e:
            await e.started()
            row = asyncio.create_task(e.answer(request(3)))
            await asyncio.sleep(0.1)
    with pytest.raises(EngineExited):
        await row
    assert re.match(LIVES_ON, logged[-1])


async def test_a_kill_for_good_does_not_wait_for_ever(engine, unkillable):
    async with engine(stuck_on=[3]) as e:
        await e.started()
        row = asyncio.create_task(e.answer(request(3)))
        await asyncio.sleep(0.1)
        e.kill("the run is stopping")
        with pytest.raises(Unkillable):
            await asyncio.wait_for(row, 10)


async def test_a_process_of_its_group_that_cannot_be_killed_ends_the_run(engine, monkeypatch):
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 0.1)
    monkeypatch.setattr(process, "end_group", lambda leader: os.getpid())
    async with engine() as e:
        await e.answer(request(1))
        os.kill(process_of(e).pid, signal.SIGKILL)
        with pytest.raises(EngineLost, match=f"the engine process {os.getpid()} cannot be killed: it is in state"):
            await asyncio.wait_for(e.answer(request(2)), 10)
        process_of(e)._process.wait()


async def test_a_killed_process_whose_socket_stays_open_is_replaced(engine, monkeypatch):
    """Somebody outside its group may hold the socket: no end of it tells of the death."""
    monkeypatch.setattr(process.EngineProcess, "_lost", lambda process: None)
    async with engine(hang_on=[3], hang_timeout=0.3) as e:
        await e.answer(request(1))
        with pytest.raises(EngineExited, match=r"no progress for 0\.3 s"):
            await asyncio.wait_for(e.answer(request(3)), 10)
        assert (await e.answer(request(4))).texts == ("row 4",)
