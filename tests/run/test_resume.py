"""The same command again: goes on where the last one was, however that ended."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchvl
from batchvl.errors import ResumeError

from .running import (
    PATIENCE,
    alive,
    answers,
    command,
    environment,
    family,
    journalled,
    questions,
    responses,
    run,
    shell,
    wait_until,
)  # fmt: skip

ROWS = 4000


def durable(out: Path, file: Path) -> dict[int, dict]:
    """What an output folder holds at this moment, by row."""
    batchvl.merge(out, file)
    return {row["row"]: row for row in pq.read_table(file).to_pylist()}


def test_kill_9_loses_nothing_and_changes_nothing(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", ROWS), tmp_path / "m-batchvl"
    behaviour = {"delay": 0.02, "spread": 0.03, "fail_every": 7}
    flags = ("--batch-size", "8", "--commit-seconds", "0.02", "--part-rows", "300", "--accept-failures", "20%")
    draw, before = random.Random(7), {}
    for attempt in range(5):
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                command(manifest, *flags, fake=behaviour), stdout=log, stderr=log, env=environment()
            )
        had = journalled(out)
        wait_until(lambda p=process, had=had: journalled(out) > had or p.poll() is not None)
        time.sleep(draw.random() * 0.3)  # at a random moment
        others = family(process.pid)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL, (tmp_path / "log").read_text()
        wait_until(lambda others=others: not alive(others))  # nobody outlives the runner
        now = durable(out, tmp_path / f"{attempt}.parquet")
        assert before.items() <= now.items(), "what was committed is unchanged"
        assert len(now) > len(before)
        before = now
    assert len(before) < ROWS, "all kills came before the end"
    summary = run(manifest, {"fail_every": 7}, accept_failures="20%")
    assert (summary.exit_code, summary.resumed, summary.rows) == (0, len(before), ROWS)
    assert responses(summary) == [f"q {n}" if n % 7 else None for n in range(ROWS)]
    after = {row["row"]: row for row in answers(summary)}
    assert before.items() <= after.items()


def test_settings_without_a_meaning_may_change(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 300)
    assert run(manifest, {"delay": 0.01}, limit=100, batch_size=4).rows == 100
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(manifest, moved / "m.jsonl")
    rest = run(
        moved / "m.jsonl", batch_size=64, part_rows=50, retries=0, image_workers=2, output=tmp_path / "m-batchvl"
    )  # fmt: skip
    assert (rest.resumed, rest.rows, rest.exit_code) == (100, 300, 0)
    assert responses(rest) == [f"q {n}" for n in range(300)]


def test_a_change_of_meaning_is_named_with_both_values(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 10)
    run(manifest)
    with pytest.raises(ResumeError) as raised:
        run(manifest, temperature=0.5, system="Be brief.")
    lines = str(raised.value).splitlines()
    assert [line.strip() for line in lines[1:3]] == [
        '--system: not given there, "Be brief." here', "--temperature: 0.0 there, 0.5 here"
    ]  # fmt: skip
    done = shell(command(manifest, "--temperature", "0.5"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
def test_a_finished_run_says_so_and_starts_nothing(name, tmp_path, monkeypatch):
    manifest, out = questions(tmp_path / name, 150), tmp_path / "m-batchvl"
    first = run(manifest)

    def spawned(*arguments, **settings):
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", spawned)
    again = run(manifest)
    assert (again.resumed, again.rows, again.exit_code, again.expected) == (150, 150, 0, 150)
    assert "nothing left to do" in str(again)
    assert answers(again) == answers(first)
    (out / "results.parquet").unlink()
    assert len(answers(run(manifest))) == 150, "and merges, were the results lost"


def test_two_runners_at_once(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 50)
    process = subprocess.Popen(
        command(manifest, fake={"delay": 60}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        wait_until(lambda: list((tmp_path / "m-batchvl").glob("shard-*/engine-*.log")))
        with pytest.raises(ResumeError, match=f"another runner is at work here .*process {process.pid}"):
            run(manifest)
    finally:
        process.kill()
        process.wait()
    assert run(manifest).rows == 50, "the lock went with the process"
