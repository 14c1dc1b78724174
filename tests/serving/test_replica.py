"""A replica keeps an engine alive: a real process of the fake engine dies, hangs, refuses and delays on request."""

import asyncio
import os
import re
import signal
import socket
import time
from functools import partial

import msgspec
import psutil
import pytest

from batchvl.errors import EngineLost, EngineUnavailable, OptionError, UsageError
from batchvl.ipc import spawn as spawning
from batchvl.serving import exits, process
from batchvl.serving.exits import EngineExited, Unkillable
from batchvl.serving.messages import StartRefused
from batchvl.serving.process import EngineProcess
from tests.runner.running import PATIENCE, children, wait_until
from tests.serving.supervised import ask, eventually, process_of, request, supervised
from tests.timing import scaled


@pytest.fixture
def engine(tmp_path, logged):
    return partial(supervised, tmp_path / "engine.log")


async def test_every_row_gets_its_own_answer_out_of_order(engine):
    async with engine(delay=0.01, spread=0.05) as e:
        answers = await asyncio.gather(*(e.answer(request(i, f"and {i}?")) for i in range(50)))
    assert [a.texts for a in answers] == [(f"row {i}", f"and {i}?") for i in range(50)]


async def test_a_refusal_keeps_its_class_and_message(engine):
    with pytest.raises(OptionError, match="no such thing"):
        async with engine(refuse="no such thing") as e:
            await e.started()


@pytest.mark.parametrize("name", ["NoSuchError", "EngineLost", "annotations"])
def test_a_refusal_of_an_unknown_class_is_a_plain_usage_error(name):
    error = StartRefused(name, "no such thing").as_error()
    assert (type(error), str(error)) == (UsageError, f"{name}: no such thing")


async def test_an_unknown_engine_option_is_refused_before_start(engine):
    with pytest.raises(OptionError, match="velocity"):
        async with engine(velocity=3):
            pass


async def test_a_death_fails_the_rows_in_flight_and_the_others_are_answered(engine):
    async with engine(die_on=[7]) as e:
        await e.answer(request(1000))
        answers = await ask(e, *range(20))
        assert (e.deaths, e.recycled) == (1, 0)
    died = [i for i, a in enumerate(answers) if isinstance(a, EngineExited)]
    assert 7 in died
    assert set(died) < set(range(20))
    assert all(answers[i].texts == (f"row {i}",) for i in range(20) if i not in died)
    assert "SIGKILL" in str(answers[7])


async def test_two_deaths_before_the_first_answer_are_final_and_quote_the_log(engine):
    async with engine(die_on=[0]) as e:
        with pytest.raises(EngineExited):
            await e.answer(request(0))
        with pytest.raises((EngineExited, EngineLost)):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match=r"died 2 times before its first answer.*SIGKILL"):
            await e.answer(request(1))


async def test_five_deaths_without_progress_are_final_but_smaller_groups_are_progress(engine):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))
        for _ in range(4):
            with pytest.raises(EngineExited):
                await e.answer(request(0))
        e.note_progress()
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
    log = tmp_path / "engine.log"
    assert "Current thread" in log.read_text()
    hangs, killed = (line for line in logged if line.startswith("the engine ") and "up again" not in line)
    assert hangs == f"the engine hangs: no progress for 0.6 s (--hang-timeout); its threads' stacks are in {log}"
    assert killed == "the engine was killed because it hung, with 1 row in flight; restarting it"


async def test_a_row_past_its_deadline_is_aborted_and_the_process_stays(engine):
    async with engine(delay=0.8, row_timeout=0.2) as e:
        response = await e.answer(request(1))
    assert response.failure is not None
    assert response.failure.code == "row_timeout"
    assert "--row-timeout" in response.failure.message


async def test_cancelling_a_row_waits_until_the_engine_has_aborted_it(engine):
    async with engine(delay=5) as e:
        await e.started()
        task = asyncio.create_task(e.answer(request(1)))
        await eventually(lambda: e.holds(1))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 4)
        assert not e.holds(1), "its tensors may be released"


async def test_an_exit_and_the_restart_are_logged(engine, tmp_path, logged):
    async with engine() as e:
        await e.answer(request(1))
        await die(e)
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert e.deaths == 1
    died, where, advice, up = logged
    assert died == "the engine was killed by SIGKILL with 0 rows in flight; restarting it"
    assert where == f"see {tmp_path}/engine.log for its last output"
    assert "--mem" in advice
    assert re.fullmatch(r"the engine is up again after \d+\.\d s", up)


async def test_an_exit_during_the_start_is_logged_as_one(engine, logged):
    async with engine(start_delay=60) as e:
        os.kill(process_of(e).pid, signal.SIGSEGV)
        await eventually(lambda: e.deaths)
    assert logged[0] == "the engine was killed by SIGSEGV while it was starting; restarting it"


async def test_what_the_engine_logs_reaches_the_runner(engine, logged, monkeypatch, caplog):
    """From any thread, with its level; nothing below INFO."""
    spawn = spawning.spawn
    monkeypatch.setattr(spawning, "spawn", lambda module, *rest: spawn("tests.serving.chatty_main", *rest))
    async with engine() as e:
        await e.started()
        await eventually(lambda: len(logged) == 2)
    assert logged == ["loading the model: 50%", "from a thread"]
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


async def test_no_process_outlives_the_engine(engine):
    async with engine(delay=60) as e:
        await e.started()
        pid = process_of(e).pid
        task = asyncio.create_task(e.answer(request(1)))
        await eventually(lambda: e.holds(1))
        assert not task.done()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(EngineExited):
        await task


async def test_a_process_that_cannot_be_started_ends_the_run_with_the_reason(engine, monkeypatch):
    async with engine(die_on=[0]) as e:
        await e.answer(request(1))

        def refuse(*arguments):
            raise OSError(11, "no more processes")

        monkeypatch.setattr(spawning, "spawn", refuse)
        with pytest.raises(EngineExited):
            await e.answer(request(0))
        with pytest.raises(EngineLost, match="no more processes"):
            await e.answer(request(1))
        monkeypatch.undo()


async def test_a_hung_process_that_exits_by_itself_is_one_death(engine, monkeypatch):
    async with engine(hang_on=[3], hang_timeout=0.6) as e:
        await e.answer(request(1))
        monkeypatch.setattr(EngineProcess, "dump_stacks", lambda process: os.kill(process.pid, signal.SIGKILL))
        with pytest.raises(EngineExited):
            await e.answer(request(3))
        assert (await e.answer(request(4))).texts == ("row 4",)
        await asyncio.sleep(0.6)  # in which the time limits are checked again, of another process
        assert e.deaths == 1


async def test_after_a_kill_no_row_waits(engine):
    async with engine(delay=60) as e:
        await e.started()
        task = asyncio.create_task(e.answer(request(1)))
        await eventually(lambda: e.holds(1))
        e.kill("the run is stopping")
        with pytest.raises(EngineExited):
            await task
        with pytest.raises(EngineLost):
            await e.answer(request(2))


async def die(engine):
    """Kill the process, and wait until the pool knows."""
    deaths = engine.deaths
    os.kill(process_of(engine).pid, signal.SIGKILL)
    await eventually(lambda: engine.deaths != deaths)


async def test_a_process_that_restarts_does_not_wait_for_rows(engine):
    async with engine(start_delay=1.5) as e:
        await e.started()
        assert e.idle_since is not None
        await asyncio.sleep(0.6)
        await e.answer(request(1))
        assert e.seconds < 0.5, "before the first batch, the intake is slow"
        await asyncio.sleep(0.6)
        assert e.wait_share == 0, "a wait after which no more rows come does not count"
        await die(e)
        assert e.idle_since is None, "it does not wait for rows that wait for a retry"
        await e.answer(request(2))
        up, waited = e.seconds, e.wait_share * e.seconds
        assert up < 1.4, "without the second start"
        assert 0.3 < waited < up


async def test_waits_for_rows_are_counted_from_the_first_batch_to_the_last(engine):
    async with engine(delay=0.5) as e:
        await e.started()
        await asyncio.sleep(0.5)
        for row in range(3):
            await e.answer(request(row))
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.5)
        assert 2.5 <= e.seconds < 2.5 + scaled(1), "three answers, and the time between them"
        assert 0.8 < e.wait_share * e.seconds < 0.8 + scaled(0.7), "twice half a second, without the end"


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


async def test_a_restarted_process_serves_the_same_revision(engine, hub):
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        hub.write_text("second words")
        await die(e)
        await e.answer(request(2))
        assert e.info.revision == "first"


@pytest.mark.parametrize("now", ["second words", "first sentences"])
async def test_another_model_answers_no_rows(now, engine, hub, monkeypatch):
    original_open = EngineProcess.open

    async def open_unpinned(process, spec, context):  # as for an engine that ignores the revision
        await original_open(process, msgspec.structs.replace(spec, revision=None), context)

    monkeypatch.setattr(EngineProcess, "open", open_unpinned)
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        hub.write_text(now)
        await die(e)
        with pytest.raises(EngineLost, match=r"the model has changed .* rows would be answered by another model"):
            await e.answer(request(2))
        assert e.info.revision == "first"


async def test_a_model_that_has_disappeared_ends_the_run(engine, hub):
    async with engine(hub=str(hub)) as e:
        await e.answer(request(1))
        hub.unlink()
        await die(e)
        with pytest.raises(EngineLost, match=r"cannot restart the engine: .*no such model"):
            await e.answer(request(2))
        assert e.deaths == 1


@pytest.fixture
def full(tmp_path):
    """A file; while it exists, another job uses the GPU's memory."""
    return tmp_path / "full"


async def test_an_engine_that_is_unavailable_at_first_refuses(engine, full):
    full.write_text("no memory")
    async with engine(unavailable=str(full)) as e:
        with pytest.raises(EngineUnavailable, match="no memory"):
            await e.started()
        assert e.deaths == 0


async def test_a_refused_restart_is_retried(engine, full, logged, monkeypatch):
    monkeypatch.setattr(exits, "REFUSED_SECONDS", 0.1)
    async with engine(unavailable=str(full)) as e:
        for _ in range(2):
            await e.answer(request(1))
            full.write_text("no memory\nand some advice")
            await die(e)
            await eventually(lambda: e.deaths % 3 == 0)
            full.unlink()
        assert (await e.answer(request(2))).texts == ("row 2",)
        assert e.deaths == 6
    refusals = [line for line in logged if "refuses" in line]
    assert refusals == 2 * [
        "the engine refuses to restart: no memory; restarting it in 0.1 s",
        "the engine refuses to restart: no memory; restarting it in 0.2 s",
    ]


async def test_refused_restarts_are_final_after_as_many_as_deaths(engine, full, monkeypatch):
    monkeypatch.setattr(exits, "REFUSED_SECONDS", 0.01)
    async with engine(unavailable=str(full)) as e:
        await e.answer(request(1))
        full.write_text("no memory")
        await die(e)
        with pytest.raises(EngineLost, match=r"died 5 times without an answer in between: .* restart: no memory"):
            await e.answer(request(2))
        assert e.deaths == 5


async def test_a_kill_ends_the_pause_after_a_refusal(engine, full):
    async with engine(unavailable=str(full)) as e:
        await e.answer(request(1))
        full.write_text("no memory")
        await die(e)
        await eventually(lambda: e.deaths >= 2)
        row = asyncio.create_task(e.answer(request(2)))
        await asyncio.sleep(0.1)
        assert not row.done()
        e.kill("the run is stopping")
        with pytest.raises(EngineExited):
            await asyncio.wait_for(row, PATIENCE)
        assert not children()


@pytest.fixture
def spawned(monkeypatch):
    """The processes that are started, in order."""
    started = []
    spawn = spawning.spawn

    def spy(*arguments):
        started.append(spawn(*arguments))
        return started[-1]

    monkeypatch.setattr(spawning, "spawn", spy)
    return started


@pytest.fixture
def unkillable(monkeypatch, spawned):
    """Make signals to process groups do nothing. After the test the watchdog ends the process."""
    monkeypatch.setattr(os, "killpg", lambda group, number: None)
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 0.5)
    yield
    [each] = spawned
    wait_until(lambda: each.poll() is not None)


UNKILLABLE = (
    r"cannot kill the engine process \d+: it is in state S 0\.5 s after SIGKILL, probably stuck .*; check the node"
)


async def test_a_hung_process_that_cannot_be_killed_ends_the_run(engine, unkillable, logged, monkeypatch):
    async with engine(stuck_on=[3], hang_timeout=0.2, batch_size=1, rows=1) as e:
        await e.answer(request(1))
        lost = await asyncio.wait_for(ask(e, 3, 4), PATIENCE)
        assert [type(error) for error in lost] == [EngineLost, EngineLost], "no row is to blame"
        assert re.match(UNKILLABLE, str(lost[0]))
        with pytest.raises(EngineLost, match="cannot kill"):
            await e.answer(request(5))
        assert psutil.Process(process_of(e).pid).status() != psutil.STATUS_ZOMBIE
        monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 60)
        since = time.monotonic()
    assert time.monotonic() - since < 30, "nothing waits for it any more"
    assert sum("hangs" in line for line in logged) == 1
    assert re.match(UNKILLABLE, logged[-1])


async def test_a_process_that_cannot_be_killed_does_not_delay_the_end(engine, unkillable, logged):
    async with asyncio.timeout(PATIENCE):
        async with engine(stuck_on=[3]) as e:
            await e.started()
            row = asyncio.create_task(e.answer(request(3)))
            await asyncio.sleep(0.1)
    with pytest.raises(EngineExited):
        await row
    assert re.match(UNKILLABLE, logged[-1])


async def test_a_kill_for_good_does_not_wait_for_ever(engine, unkillable):
    async with engine(stuck_on=[3]) as e:
        await e.started()
        row = asyncio.create_task(e.answer(request(3)))
        await asyncio.sleep(0.1)
        e.kill("the run is stopping")
        with pytest.raises(Unkillable):
            await asyncio.wait_for(row, PATIENCE)


async def test_a_process_of_its_group_that_cannot_be_killed_ends_the_run(engine, spawned, monkeypatch):
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    monkeypatch.setattr(process, "UNKILLABLE_SECONDS", 0.1)
    monkeypatch.setattr(process, "end_group", lambda leader: os.getpid())
    async with engine() as e:
        await e.answer(request(1))
        os.kill(process_of(e).pid, signal.SIGKILL)
        with pytest.raises(EngineLost, match=f"cannot kill the engine process {os.getpid()}: it is in state"):
            await asyncio.wait_for(e.answer(request(2)), PATIENCE)
        spawned[0].wait()


async def test_a_killed_process_whose_socket_stays_open_is_replaced(engine, monkeypatch):
    """A process outside the group may hold the socket: then its end does not show the exit."""
    held = []
    socketpair = socket.socketpair

    def hold(*arguments):
        ours, theirs = socketpair(*arguments)
        held.append(theirs.dup())
        return ours, theirs

    monkeypatch.setattr(socket, "socketpair", hold)
    async with engine(hang_on=[3], hang_timeout=0.3) as e:
        await e.answer(request(1))
        with pytest.raises(EngineExited, match=r"no progress for 0\.3 s"):
            await asyncio.wait_for(e.answer(request(3)), PATIENCE)
        assert (await e.answer(request(4))).texts == ("row 4",)
    for each in held:
        each.close()
