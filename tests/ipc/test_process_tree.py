"""What an engine starts ends with it, whoever else ends, and however: kill -9, with Python's lock held, in order."""

import asyncio
import mmap
import os
import signal
import subprocess
import sys

import psutil
import pytest

from batchvl.ipc import process_tree as family
from batchvl.serving.exits import EngineExited
from tests.runner.running import alive, children, command, environment, questions, wait_until
from tests.serving.supervised import group, is_guardian, process_of, request, supervised
from tests.timing import scaled

MIB = 2**20


async def end_of(processes):
    for _ in range(500):
        if not alive(processes):
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"these survived: {alive(processes)}")


async def up(engine, forks):
    """The engine's processes once it is up: itself, its forks, its guardian."""
    await engine.started()
    while not any(map(is_guardian, found := group(process_of(engine).pid))):
        await asyncio.sleep(0.01)
    assert len(found) == forks + 2
    return found


async def test_forks_end_when_the_engine_alone_is_killed(tmp_path):
    async with supervised(tmp_path / "log", forks=2) as engine:
        await engine.answer(request(0))
        before = await up(engine, 2)
        os.kill(process_of(engine).pid, signal.SIGKILL)  # the forks hold the socket: no end of it tells of the death
        await end_of(before)
        assert (await engine.answer(request(1))).texts == ("row 1",)
        assert engine.deaths == 1
        after = await up(engine, 2)
        assert not {p.pid for p in before} & {p.pid for p in after}
    assert not alive(after), "at the end in order"


async def test_forks_end_with_an_engine_that_holds_pythons_lock(tmp_path):
    async with supervised(tmp_path / "log", forks=1, stuck_on=[3], hang_timeout=0.6) as engine:
        await engine.answer(request(0))
        before = await up(engine, 1)
        with pytest.raises(EngineExited, match=r"no progress for 0\.6 s") as died:
            await engine.answer(request(3))
        assert not alive(before), "none may still read the arena when the row is given back"
        assert "_hold_lock" in str(died.value), "where it stands"
        assert (await engine.answer(request(4))).texts == ("row 4",)


async def test_the_end_of_a_run_ends_an_engine_that_holds_pythons_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("batchvl.serving.process.LEAVE_SECONDS", 0.2)
    async with supervised(tmp_path / "log", forks=1, stuck_on=[3]) as engine:
        processes = await up(engine, 1)
        task = asyncio.create_task(engine.answer(request(3)))
        await asyncio.sleep(0.1)
        assert not task.done()
    assert not alive(processes)
    with pytest.raises(EngineExited):
        await task


async def test_without_its_guardian_the_runner_ends_the_forks(tmp_path):
    async with supervised(tmp_path / "log", forks=1) as engine:
        await engine.answer(request(0))
        main, fork, guardian = await up(engine, 1)
        guardian.kill()
        await engine.answer(request(1))
    assert not alive([main, fork])


async def test_the_guardian_is_small_and_holds_nothing_open(tmp_path):
    async with supervised(tmp_path / "log", forks=1) as engine:
        main, fork, guardian = await up(engine, 1)
        folder = f"/proc/{guardian.pid}/fd"
        files = [os.readlink(f"{folder}/{number}") for number in sorted(os.listdir(folder), key=int)]
        assert files[:3] == ["/dev/null"] * 3
        assert sorted(name.partition(":")[0] for name in files[3:]) == ["anon_inode", "pipe"], "pidfd and lifeline"
        assert family._anonymous(guardian.pid) < 8 * MIB
        assert set(family._family(main.pid)) == {main.pid, fork.pid}, "it is not the engine's"


def start(manifest, **fake):
    """A run as a command, and its engine's processes."""
    runner = subprocess.Popen(
        command(manifest, "--batch-size", "4", fake={"forks": 1, **fake}), env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    found = []

    def is_up():
        for child in psutil.Process(runner.pid).children():
            if "batchvl.serving.engine_main" in child.cmdline():
                found[:] = group(child.pid)
        return len(found) == 3 and is_guardian(found[-1])

    wait_until(is_up)
    return runner, found


@pytest.mark.parametrize("fake", [{"delay": 60}, {"stuck_on": [0]}, {"start_delay": 60}])
def test_nothing_survives_a_runner_that_is_killed(fake, tmp_path):
    runner, processes = start(questions(tmp_path / "m.jsonl", 20), **fake)
    with runner:
        everything = [*processes, *psutil.Process(runner.pid).children(recursive=True)]
        runner.kill()
    wait_until(lambda: not alive(everything))


def test_the_guardian_needs_no_runner(tmp_path):
    """The runner is stopped, as by Ctrl-Z, when the engine is killed; it goes on when it is continued."""
    runner, processes = start(questions(tmp_path / "m.jsonl", 20), delay=0.5, rows=4)
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


def test_memory_is_what_the_processes_have_for_themselves():
    before = family.memory_of(os.getpid())
    with mmap.mmap(-1, 64 * MIB) as shared:  # as the arena is
        shared.write(b"." * 64 * MIB)
        assert abs(family.memory_of(os.getpid()) - before) < 32 * MIB
        private = bytearray(b".") * (64 * MIB)
        assert family.memory_of(os.getpid()) - before > 60 * MIB
        del private
    code = f"x = bytearray(b'.') * {64 * MIB}; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        assert family.memory_of(os.getpid()) - before > 60 * MIB, "of descendants as well"
        child.communicate(b"\n")


@pytest.fixture
def half_ended():
    """A process whose first thread has ended while another sleeps: a zombie to look at, and alive."""
    code = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(60,)).start()"
    code += "; ctypes.PyDLL(None).pthread_exit(None)"
    with subprocess.Popen([sys.executable, "-c", code], process_group=0) as process:
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
        yield process
        process.kill()


def test_a_process_with_a_thread_left_has_not_ended(half_ended):
    assert family.state_of(half_ended.pid) == "S"
    assert list(family._family(half_ended.pid)) == [half_ended.pid]
    half_ended.kill()
    wait_until(lambda: not family.state_of(half_ended.pid))
    assert not list(family._family(half_ended.pid))


def test_who_survives_in_a_group_is_named(half_ended, monkeypatch):
    monkeypatch.setattr(family, "_KILL_SECONDS", 0.1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", lambda group, number: None)
        assert family.end_group(half_ended.pid) == half_ended.pid
    assert family.end_group(half_ended.pid) is None
