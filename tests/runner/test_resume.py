"""The same command again resumes where the last run stopped, however that ended."""

import json
import os
import subprocess

import pytest

from batchvl.errors import ResumeError

from .running import answers, command, environment, questions, responses, run, shell, wait_until


def test_settings_that_do_not_change_answers_may_differ(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 300)
    assert run(manifest, {"delay": 0.01}, limit=100, batch_size=4).rows == 100
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    os.rename(manifest, moved / "m.jsonl")
    rest = run(
        moved / "m.jsonl", batch_size=64, part_rows=50, retries=0, image_workers=2, output=tmp_path / "m-batchvl"
    )
    assert (rest.resumed, rest.rows, rest.exit_code) == (100, 300, 0)
    assert responses(rest) == [f"q {n}" for n in range(300)]


def test_a_setting_that_changes_answers_is_reported_with_both_values(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 10)
    run(manifest)
    with pytest.raises(ResumeError) as raised:
        run(manifest, temperature=0.5, system="Be brief.")
    lines = str(raised.value).splitlines()
    assert [line.strip() for line in lines[1:3]] == [
        '--system: not given there, "Be brief." here',
        "--temperature: 0.0 there, 0.5 here",
    ]
    done = shell(command(manifest, "--temperature", "0.5"))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
def test_a_finished_run_starts_no_process(name, tmp_path, monkeypatch):
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
    assert len(answers(run(manifest))) == 150, "merged again, since the results were lost"


def test_the_summary_is_written_again_if_the_run_was_killed_before_it_wrote_its_own(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 150)
    file = tmp_path / "m-batchvl" / "summary.json"
    run(manifest)
    done = json.loads(file.read_bytes())
    file.write_text(json.dumps(done | {"rows": 90, "exit_code": 75}))  # of an earlier run, stopped by a signal
    assert "nothing left to do" in str(run(manifest))
    summary = json.loads(file.read_bytes())
    assert (summary["rows"], summary["exit_code"]) == (150, 0)


def test_a_run_that_adds_no_row_does_not_claim_to_be_complete(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 60)
    run(manifest, limit=20)
    summary = run(manifest, {"die_on": [*range(20, 60)]})
    assert (summary.exit_code, summary.rows, summary.resumed) == (1, 20, 20)
    assert "nothing left to do" not in str(summary)


def test_a_second_runner_is_refused(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 50)
    process = subprocess.Popen(
        command(manifest, fake={"delay": 60}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        wait_until(lambda: list((tmp_path / "m-batchvl").glob("shard-*/engine-*.log")))
        with pytest.raises(ResumeError, match=f"in use by another runner \\(.*process {process.pid}"):
            run(manifest)
    finally:
        process.kill()
        process.wait()
    assert run(manifest).rows == 50, "the lock ended with the process"
