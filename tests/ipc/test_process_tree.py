"""The processes that an engine starts end with it, however the engine or the runner ends."""

import asyncio
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from batchvl.ipc.process_tree import end_group, memory_of, private_memory, processes_of, state_of
from batchvl.serving.exits import EngineExited
from tests.runner.running import alive, children, command, environment, questions, wait_until
from tests.serving.supervised import group, is_guardian, process_of, request, supervised
from tests.timing import scaled

MIB = 2**20


async def wait_for_end(processes):
    for _ in range(500):
        if not alive(processes):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"these survived: {alive(processes)}")


async def start_engine(engine, forks):
    """Wait until the engine has started, and return its processes: itself, its forks and its watchdog."""
    await engine.started()
    while not any(map(is_guardian, processes := group(process_of(engine).pid))):
        await asyncio.sleep(0.01)
    assert len(processes) == forks + 2
    return processes


async def test_forks_end_when_only_the_engine_is_killed(tmp_path):
    async with supervised(tmp_path / "log", forks=2) as engine:
        await engine.answer(request(0))
        before = await start_engine(engine, 2)
        os.kill(process_of(engine).pid, signal.SIGKILL)  # the forks hold its socket open: no end of file
        await wait_for_end(before)
        assert (await engine.answer(request(1))).texts == ("row 1",)
        assert engine.deaths == 1
        after = await start_engine(engine, 2)
        assert not {p.pid for p in before} & {p.pid for p in after}
    assert not alive(after), "after a normal end"


async def test_forks_end_with_an_engine_that_holds_the_gil(tmp_path):
    async with supervised(tmp_path / "log", forks=1, stuck_on=[3], hang_timeout=0.6) as engine:
        await engine.answer(request(0))
        before = await start_engine(engine, 1)
        with pytest.raises(EngineExited, match=r"no progress for 0\.6 s") as error:
            await engine.answer(request(3))
        assert not alive(before), "none may still read the arena when the row fails"
        assert "_hold_lock" in str(error.value), "the stack trace"
        assert (await engine.answer(request(4))).texts == ("row 4",)


async def test_the_end_of_a_run_ends_an_engine_that_holds_the_gil(tmp_path, monkeypatch):
    monkeypatch.setattr("batchvl.serving.process.LEAVE_SECONDS", 0.2)
    async with supervised(tmp_path / "log", forks=1, stuck_on=[3]) as engine:
        processes = await start_engine(engine, 1)
        task = asyncio.create_task(engine.answer(request(3)))
        await asyncio.sleep(0.1)
        assert not task.done()
    assert not alive(processes)
    with pytest.raises(EngineExited):
        await task


async def test_the_runner_ends_the_forks_if_the_watchdog_was_killed(tmp_path):
    async with supervised(tmp_path / "log", forks=1) as engine:
        await engine.answer(request(0))
        main, fork, watchdog = await start_engine(engine, 1)
        watchdog.kill()
        await engine.answer(request(1))
    assert not alive([main, fork])


async def test_the_watchdog_is_small_and_has_few_open_files(tmp_path):
    async with supervised(tmp_path / "log", forks=1) as engine:
        main, fork, watchdog = await start_engine(engine, 1)
        fds = Path(f"/proc/{watchdog.pid}/fd")
        files = [os.readlink(fds / number) for number in sorted(os.listdir(fds), key=int)]
        assert files[:3] == ["/dev/null"] * 3
        assert sorted(name.partition(":")[0] for name in files[3:]) == ["anon_inode", "pipe"], "pidfd and parent pipe"
        assert private_memory(watchdog) < 8 * MIB
        assert set(processes_of(main.pid)) == {main, fork}, "the watchdog does not count"


def start_run(manifest, **fake):
    """Start a run as a command; return its process and its engine's processes."""
    arguments = command(manifest, "--batch-size", "4", fake={"forks": 1, **fake})
    runner = subprocess.Popen(
        arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    processes = []

    def is_up():
        for child in psutil.Process(runner.pid).children():
            if "batchvl.serving.engine_main" in child.cmdline():
                processes[:] = group(child.pid)
        return len(processes) == 3 and is_guardian(processes[-1])

    wait_until(is_up)
    return runner, processes


@pytest.mark.parametrize("fake", [{"delay": 60}, {"stuck_on": [0]}, {"start_delay": 60}])
def test_no_process_survives_a_killed_runner(fake, tmp_path):
    runner, processes = start_run(questions(tmp_path / "m.jsonl", 20), **fake)
    with runner:
        everything = [*processes, *psutil.Process(runner.pid).children(recursive=True)]
        runner.kill()
    wait_until(lambda: not alive(everything))


def test_the_watchdog_works_while_the_runner_is_stopped(tmp_path):
    """The engine is killed while the runner is stopped, as by Ctrl-Z; continued, the runner restarts the engine."""
    runner, processes = start_run(questions(tmp_path / "m.jsonl", 20), delay=0.5, rows=4)
    with runner:
        runner.send_signal(signal.SIGSTOP)
        processes[0].kill()
        wait_until(lambda: not alive(processes))
        runner.send_signal(signal.SIGCONT)
        _, errors = runner.communicate(timeout=scaled(60))
    assert runner.returncode == 0
    assert "the engine was killed by SIGKILL" in errors
    assert "the engine is up again" in errors
    assert not children()


def test_only_private_memory_counts():
    before = memory_of(os.getpid())
    with mmap.mmap(-1, 64 * MIB) as shared:  # like the arena
        shared.write(b"." * 64 * MIB)
        assert abs(memory_of(os.getpid()) - before) < 32 * MIB
        private = bytearray(b".") * (64 * MIB)
        assert memory_of(os.getpid()) - before > 60 * MIB
        del private
    code = f"x = bytearray(b'.') * {64 * MIB}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert memory_of(os.getpid()) - before > 60 * MIB, "the memory of descendants counts"
        child.communicate(b"\n")


@pytest.fixture
def half_ended():
    """A process whose first thread has ended while another one sleeps: ps shows a zombie, but it is alive."""
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    code += "; ctypes.PyDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], process_group=0) as process:
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        yield process
        process.kill()


def test_a_process_with_a_live_thread_is_alive(half_ended):
    wait_until(lambda: state_of(half_ended.pid) == "S")  # it may still run on a busy machine
    assert [process.pid for process in processes_of(half_ended.pid)] == [half_ended.pid]
    half_ended.kill()
    wait_until(lambda: not state_of(half_ended.pid))
    assert not processes_of(half_ended.pid)


def test_end_group_returns_a_survivor(half_ended, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: None)
        assert end_group(half_ended.pid, timeout=0.1) == half_ended.pid
    assert end_group(half_ended.pid) is None


def test_members_of_a_group_count_after_their_parent_has_ended():
    """And so do descendants that left the group."""
    outsider = "import subprocess as s, time; print(s.Popen(['sleep', '60'], process_group=0).pid, flush=True)"
    member = f"{outsider}; time.sleep(60)"
    leader_code = f"import subprocess as s, sys; s.Popen([sys.executable, '-c', {member!r}])"
    arguments = [sys.executable, "-c", leader_code]
    with subprocess.Popen(arguments, process_group=0, stdout=subprocess.PIPE, text=True) as leader:
        outside = psutil.Process(int(leader.stdout.readline()))
        wait_until(lambda: psutil.Process(leader.pid).status() == psutil.STATUS_ZOMBIE)
        members = processes_of(leader.pid)
        assert outside in members
        assert len(members) == 2
        assert end_group(leader.pid) is None
        assert alive(members) == [outside], "`end_group` kills only the group"
        outside.kill()
