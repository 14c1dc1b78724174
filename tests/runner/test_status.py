"""`batchvl status` of runs: running, killed, stopped and finished, of one shard and of several."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import batchvl

from .running import PATIENCE, command, environment, on_a_terminal, questions, run, shell, wait_until

STATUS = [sys.executable, "-m", "batchvl", "status"]


def status(out: Path, *flags: str) -> str:
    """Run `batchvl status` and return its output."""
    done = shell([*STATUS, str(out), *flags])
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def start(*arguments, **settings) -> subprocess.Popen:
    return subprocess.Popen(
        command(*arguments, **settings), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(PATIENCE)


def test_a_run_that_is_killed_while_the_model_loads(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", 600), tmp_path / "m-batchvl"
    process = start(manifest, fake={"start_delay": 600})
    try:
        wait_until(lambda: list(out.glob("shard-*/engine-*.log")))
        wait_until(lambda: batchvl.status(out).expected)
        text = status(out)
    finally:
        kill(process)
    who = f"attempt 1 on {os.uname().nodename}, process {process.pid}, since 20"
    assert text.startswith("0 of about 600 rows done (0.0%): 0 ok, 0 failed\n")
    assert "\nno rate yet, time left unknown, last activity " in text
    assert f"\nrunning, {who}" in text
    text = status(out)
    assert "running" not in text
    assert f"\nstale, {who}" in text
    assert text.endswith("\nto resume: run the same command again\n")


def test_a_run_from_its_first_rows_to_a_kill_and_to_its_end(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", 600), tmp_path / "m-batchvl"
    process = start(manifest, "--batch-size", "4", fake={"delay": 0.2, "fail_every": 10, "rows": 8})
    try:
        wait_until((out / "run.json").exists)
        wait_until(lambda: process.poll() is not None or batchvl.status(out).eta_seconds)
        assert process.poll() is None
        current = batchvl.status(out)
        assert 0 < current.rows < 600
        assert current.rows_per_second is not None
        assert current.rows_per_second < 200, "at most 8 rows in 0.2 s"
        assert (current.expected, current.estimated, current.shards[0].state) == (600, True, "running")
        assert current.eta_seconds == pytest.approx((600 - current.rows) / current.rows_per_second, rel=0.01)
    finally:
        kill(process)
    after = json.loads(status(out, "--json"))
    assert after["rows"] >= current.rows
    assert after["failures"] == {"engine_error": after["failed"]}
    assert (after["stale"], after["expected"], after["rows_per_second"]) == ([0], 600, None)
    assert (after["shards"][0]["pid"], after["shards"][0]["attempt"]) == (process.pid, 1)
    run(manifest, {"fail_every": 10})
    assert str(batchvl.status(out)) == (
        "600 of 600 rows done (100.0%): 540 ok, 60 failed\n        60 engine_error\ncomplete, attempt 2"
    )


def test_running_stopped_finished_and_waiting_shards(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 90), tmp_path / "m-batchvl"
    run(manifest, {"fail_every": 20}, shard="1/3")
    processes = [start(manifest, "--shard", shard, fake={"delay": 60}) for shard in ("0/3", "2/3")]
    try:
        for shard in (0, 2):
            wait_until(lambda shard=shard: list(out.glob(f"shard-0000{shard}-*/engine-*.log")))
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(PATIENCE) == 75
        current = batchvl.status(out)
    finally:
        for process in processes:
            kill(process)
    shards = [(shard.shard, shard.state, shard.rows, shard.expected) for shard in current.shards]
    assert shards == [(0, "stopped", 0, 30), (1, "complete", 30, 30), (2, "running", 0, 30)]
    assert current.shards[0].message.startswith("stopped by SIGTERM")
    assert (current.rows, current.failures) == (30, {"engine_error": 1})
    text = status(out)
    assert "3 shards: 1 complete, 1 stale, 1 stopped\nto resume: run the same command again for shards 0,2\n" in text
    assert re.search(r"^ +1 +complete +30 of 30 +100\.0% +1 +1$", text, re.M)


def test_the_message_is_that_of_the_last_attempt(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 4000), tmp_path / "m-batchvl"
    run(manifest, {"fail_every": 1, "delay": 0.05, "rows": 1}, max_failures="0", shard="0/2", batch_size=1)
    assert "more than --max-failures 0" in batchvl.status(out).shards[0].message
    process = start(manifest, "--shard", "0/2", fake={"delay": 60})
    try:
        wait_until(lambda: list(out.glob("shard-00000-*/engine-0002.log")))
        assert batchvl.status(out).shards[0].message == ""
    finally:
        kill(process)
    assert (batchvl.status(out).shards[0].state, batchvl.status(out).shards[0].message) == ("stale", "")


@pytest.mark.slow
def test_the_first_shard_counts_the_rows_of_a_text_manifest(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", 900), tmp_path / "m-batchvl"
    process = start(manifest, "--shard", "1/3", fake={"delay": 60})
    try:
        wait_until((out / "manifest-index.json").exists)
        current = batchvl.status(out)
    finally:
        kill(process)
    assert (current.expected, current.estimated, [shard.expected for shard in current.shards]) == (
        900,
        False,
        [300] * 3,
    )


def test_a_limited_run_is_complete_until_it_is_resumed(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 90), tmp_path / "m-batchvl"
    run(manifest, limit=40)
    assert (batchvl.status(out).complete, batchvl.status(out).expected) == (True, 40)
    run(manifest, limit=60)
    assert (batchvl.status(out).complete, batchvl.status(out).expected) == (True, 60)


def test_heartbeats_while_the_model_loads(tmp_path, monkeypatch):
    monkeypatch.setattr("batchvl.runner.execution.HEARTBEAT_SECONDS", 0.02)
    manifest, out = questions(tmp_path / "m.parquet", 10), tmp_path / "m-batchvl"
    times, over = set(), threading.Event()

    def collect_times():
        while not over.wait(0.005):
            for lock in out.glob("shard-*/lock"):
                if not list(out.glob("shard-*/journal-*")):
                    times.add(lock.stat().st_mtime_ns)

    thread = threading.Thread(target=collect_times)
    thread.start()
    try:
        run(manifest, {"start_delay": 1})
    finally:
        over.set()
        thread.join()
    assert len(times) > 5


@pytest.mark.slow
def test_watching_a_run_without_a_terminal(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 120), tmp_path / "m-batchvl"
    run(manifest, shard="0/2")
    with subprocess.Popen(
        [*STATUS, out, "--watch", "0.1", "--json"], stdout=subprocess.PIPE, env=environment()
    ) as watch:
        pages = [watch.stdout.readline()]
        rest = start(manifest, "--shard", "1/2", "--batch-size", "4", fake={"delay": 0.2, "rows": 4})
        try:
            pages += watch.stdout
        finally:
            kill(rest)
        assert watch.wait(PATIENCE) == 0
    rows = [json.loads(page)["rows"] for page in pages]
    assert (rows[0], rows[-1], rows) == (60, 120, sorted(rows))
    assert len(set(rows)) > 2, "its progress was seen"
    block = shell([*STATUS, "--watch", str(out)]).stdout
    assert re.match(r"20\S+ /.*\n120 of 120 rows done \(100\.0%\): 120 ok, 0 failed\n2 shards: 2 complete\n\n", block)


def test_watching_on_a_terminal_ends_with_the_run(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 2), tmp_path / "m-batchvl"
    run(manifest, shard="19/40")  # of 40 shards, two have a row
    runners = []
    code, shown = on_a_terminal(
        [*STATUS, str(out), "--watch", "0.2"],
        20,
        60,
        b"1 waiting",
        lambda _: runners.append(start(manifest, "--shard", "39/40", fake={"delay": 1})),
    )
    kill(runners[0])
    assert code == 0
    first, *pages = shown.split("\x1b[H\x1b[J")
    assert first == ""
    assert all(len(page.splitlines()) <= 20 and max(map(len, page.splitlines())) <= 60 for page in pages)
    assert pages[0].startswith("1 of 2 rows done (50.0%)")
    assert "40 shards: 39 complete, 1 waiting" in pages[0]
    assert any("40 shards: 39 complete, 1 running" in page for page in pages)
    assert pages[-1].startswith("2 of 2 rows done (100.0%)")
    assert "40 shards: 40 complete" in pages[-1]


def test_an_interrupt_ends_watching_without_a_message(tmp_path):
    manifest, out = questions(tmp_path / "m.parquet", 12), tmp_path / "m-batchvl"
    run(manifest, shard="0/3")
    code, shown = on_a_terminal(
        [*STATUS, "--watch", str(out)], 20, 60, b"2 waiting", lambda process: process.send_signal(signal.SIGINT)
    )
    assert code == 0
    assert "Traceback" not in shown
    assert "Abort" not in shown


def test_a_directory_that_is_no_output(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        done = shell([*STATUS, str(path)])
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert str(path) in done.stderr
