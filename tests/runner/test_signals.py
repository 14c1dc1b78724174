"""Signals: the run ends in order with exit code 75, leaves no process behind and can be resumed."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import time

import pytest

from batchvl.runner.progress import Progress
from batchvl.runner.signals import handle_signals

from ..manifest.writing import write
from .running import (
    PATIENCE,
    alive,
    children,
    command,
    descendants,
    environment,
    journalled,
    questions,
    responses,
    run,
    wait_until,
)

UP = ", batches of "
"""Part of the line that says that the engine is up."""


class Running:
    """A run in a process of its own."""

    def __init__(self, arguments, **settings):
        self.process = subprocess.Popen(
            arguments,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            **{"env": environment(), **settings},
        )
        self.output = ""

    def wait_for(self, text):
        """Wait until the text is in the output."""
        assert self.process.stderr is not None
        while text not in self.output:
            line = self.process.stderr.readline()
            assert line, f"{text!r} is missing:\n{self.output}"
            self.output += line

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """Return the exit code, once the process and all its descendants have exited."""
        others = descendants(self.process.pid)
        self.output += self.process.communicate(timeout=PATIENCE)[1]
        wait_until(lambda: not alive(others))
        assert "Traceback" not in self.output, self.output
        assert "never retrieved" not in self.output, self.output
        return self.process.returncode


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_rows_in_the_engine_are_finished_and_the_others_left(name, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 1000)
    running = Running(command(manifest, "--batch-size", "4", fake={"delay": 0.6, "rows": 8}))
    wait_until(lambda: journalled(tmp_path / "m-batchvl"))  # some rows are answered, so the next ones are in the engine
    running.send(signal.Signals[name])
    assert running.end() == 75, running.output
    assert f"{name}: no new rows" in running.output
    assert f"stopped by {name}: run the same command again to resume" in running.output
    rest = run(manifest)
    left = re.search(r"(\d+) rows in the engine have 20 s to finish", running.output)
    assert left, running.output
    assert rest.resumed >= int(left[1]) > 0, "the rows in the engine were finished"
    assert (rest.rows, rest.exit_code) == (1000, 0)
    assert responses(rest) == [f"q {n}" for n in range(1000)]


def test_rows_in_the_engine_are_left_after_the_grace(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    running = Running(command(manifest, "--grace", "0.2s", "--batch-size", "4", fake={"slow_every": 2}))
    running.wait_for(UP)
    wait_until(lambda: journalled(tmp_path / "m-batchvl"))
    started = time.monotonic()
    running.send(signal.SIGTERM)
    assert running.end() == 75, running.output
    assert time.monotonic() - started < 30, "a row takes a minute"
    assert "rows in the engine have 0.2 s to finish" in running.output
    assert "the engine died" not in running.output, "killed by the runner is no death"
    rest = run(manifest)
    assert 0 < rest.resumed <= 10
    assert (rest.rows, rest.exit_code) == (20, 0)


def test_the_same_signal_again_exits_immediately(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    running = Running(command(manifest, "--batch-size", "4", fake={"slow_every": 2}))
    running.wait_for(UP)
    wait_until(lambda: journalled(tmp_path / "m-batchvl"))
    running.send(signal.SIGTERM)
    running.wait_for("SIGTERM: no new rows")
    running.send(signal.SIGTERM)  # too soon: it counts as a duplicate
    time.sleep(2.1)  # FORCE_EXIT_AFTER, as documented
    assert running.process.poll() is None
    running.send(signal.SIGTERM)
    assert running.end() == 75
    assert "SIGTERM again: exiting immediately" in running.output
    assert "rows done" not in running.output
    assert run(manifest).rows == 20


@pytest.mark.parametrize("behaviour", [{"start_delay": 600}, {"delay": 600}])
def test_a_stop_while_the_engine_starts_does_not_wait_for_it(behaviour, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 10)
    running = Running(command(manifest, "--grace", "0", fake=behaviour))
    if "delay" in behaviour:
        running.wait_for(UP)
    else:
        wait_until(lambda: list((tmp_path / "m-batchvl").glob("shard-*/images-*.log")))
    running.send(signal.SIGTERM)
    assert running.end() == 75, running.output
    assert (tmp_path / "m-batchvl/summary.json").is_file()
    assert run(manifest).rows == 10


@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_a_stop_at_any_moment_of_the_start(wait, tmp_path):
    """From the moment that the engine's log exists, a signal ends the run in order."""
    manifest = questions(tmp_path / "m.jsonl", 20)
    running = Running([*command(manifest, fake={"delay": 600}), "--grace", "0"])
    wait_until(lambda: list((tmp_path / "m-batchvl").glob("shard-*/engine-*")))
    time.sleep(wait)
    running.send(signal.SIGTERM)
    assert running.end() == 75, running.output


def test_rows_that_wait_for_a_retry_are_left_to_the_next_run(tmp_path, monkeypatch):
    original_commit = Progress.commit

    def commit(self, counts):
        original_commit(self, counts)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "commit", commit)
    monkeypatch.setattr("batchvl.runner.scheduler.RETRY_SECONDS", 3600.0)
    manifest = questions(tmp_path / "m.jsonl", 40)
    summary = run(manifest, {"flaky_every": 4})
    assert summary.exit_code == 75
    assert summary.failed == 0
    assert summary.rows <= 30
    monkeypatch.undo()
    rest = run(manifest)
    assert (rest.rows, rest.ok, rest.resumed) == (40, 40, summary.rows)


def test_ignored_signals_stay_ignored(tmp_path):
    """`nohup batchvl run …` continues when the terminal closes."""
    manifest = questions(tmp_path / "m.jsonl", 40)
    running = Running(["nohup", *command(manifest, fake={"delay": 0.5})], stdin=subprocess.DEVNULL)
    running.wait_for(UP)
    running.send(signal.SIGHUP)
    assert running.end() == 0, running.output


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 100)
    running = Running(command(manifest, "--batch-size", "8", fake={"delay": 0.05, "rows": 8}))
    running.wait_for(UP)
    assert running.process.stderr is not None
    running.process.stderr.close()  # as `2>&1 | head -1` does
    assert running.process.wait(PATIENCE) == 0
    assert run(manifest).resumed == 100


async def test_previous_handlers_are_restored():
    def previous(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, previous)
    names = []
    try:
        with handle_signals(names.append, names.append):
            os.kill(os.getpid(), signal.SIGTERM)
            while not names:
                await asyncio.sleep(0.01)
        assert names == ["SIGTERM"]
        assert signal.getsignal(signal.SIGTERM) is previous
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_stop_in_this_process_leaves_no_process_behind(name, tmp_path, monkeypatch):
    original_commit = Progress.commit

    def commit(self, counts):
        original_commit(self, counts)
        os.kill(os.getpid(), signal.Signals[name])

    def previous(number, frame):
        pass

    before = signal.signal(signal.Signals[name], previous)  # SIGHUP would stay ignored where nohup started the tests
    try:
        monkeypatch.setattr(Progress, "commit", commit)
        summary = run(questions(tmp_path / "m.jsonl", 5000), {"delay": 0.02})
        assert signal.getsignal(signal.Signals[name]) is previous
    finally:
        signal.signal(signal.Signals[name], before)
    assert summary.exit_code == 75
    assert 0 < summary.rows < 5000
    assert name in summary.message
    assert not children()


def test_a_row_in_its_second_attempt_does_not_outlive_the_grace(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    flags = ("--grace", "0.8s", "--row-timeout", "0.5s", "--retries", "100")
    running = Running(command(manifest, *flags, fake={"slow_every": 1}))
    running.wait_for(UP)
    time.sleep(2.5)  # attempts end after half a second each
    running.send(signal.SIGTERM)
    assert running.end() == 75


def test_a_stop_while_rows_wait_for_memory(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        manifest = write(tmp_path / "m.jsonl", [{"prompt": "q", "image": f"{address}/{i}.png"} for i in range(40)])
        flags = ("--allow-private", "127.0.0.0/8", "--arena-bytes", "16MB", "--max-image-bytes", "4MB")
        running = Running(command(manifest, *flags))
        running.wait_for(UP)
        silent.accept()[0].close()  # a row fetches; others wait, since the arena has room for two
        running.send(signal.SIGTERM)
        assert running.end() == 75


def test_stop_after_a_time(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 1000)
    running = Running(command(manifest, "--stop-after", "4s", "--batch-size", "4", fake={"delay": 0.2, "rows": 8}))
    assert running.end() == 75, running.output
    assert "--stop-after 4s: no new rows" in running.output
    assert "stopped by --stop-after 4s: run the same command again to resume" in running.output
    rest = run(manifest, stop_after="1h")
    assert (rest.rows, rest.exit_code) == (1000, 0)
    assert 0 <= rest.resumed < 1000
    assert responses(rest) == [f"q {n}" for n in range(1000)]


@pytest.mark.parametrize(("kill_wait", "left"), [("12 sec", "7"), ("3 sec", "0"), ("90 sec", "20"), ("(null)", "20")])
def test_the_grace_ends_before_slurm_kills(kill_wait, left, tmp_path):
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text(
        f"#!/bin/sh\necho 'KillOnBadExit           = 0'\necho 'KillWait                = {kill_wait}'\n"
    )
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    manifest = questions(tmp_path / "m.jsonl", 400)
    running = Running(
        command(manifest, "--batch-size", "4", fake={"delay": 0.6, "rows": 8}),
        env=environment(PATH=path, SLURM_JOB_ID="7"),
    )
    wait_until(lambda: journalled(tmp_path / "m-batchvl"))
    running.send(signal.SIGTERM)
    assert running.end() == 75, running.output
    assert f"rows in the engine have {left} s to finish" in running.output
