"""`batchvl retry`: which rows are retried, with which options, and which results are kept."""

import signal
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import batchvl
from batchvl.errors import OptionError, ResumeError
from batchvl.runner.summary import Summary

from ..manifest.writing import write
from .running import (
    PATIENCE,
    answers,
    codes,
    command,
    engine_options,
    environment,
    journalled,
    make_image,
    questions,
    responses,
    run,
    shell,
    wait_until,
)

ROWS = 60
MISSING = {n for n in range(ROWS) if n % 20 == 5}
FLAKY = {n for n in range(ROWS) if n % 10 == 0}


def retry(out: Path, fake: dict | None = None, **options) -> list[Summary]:
    settings = {"commit_seconds": 0.05, "image_workers": 1, "quiet": True, **options}
    return batchvl.retry(out, engine_option=engine_options(fake or {}), **settings)


def records(out: Path) -> dict[str, list[dict]]:
    """Return the rows of all parts, by the names of the parts."""
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(out.glob("shard-*/part-*.parquet"))}


@pytest.fixture(params=["m.jsonl", "m.parquet"])
def out(tmp_path, request) -> Path:
    """The output of 60 rows: six failed in the engine, and three images are missing."""
    rows = [{"prompt": f"q {n}", "images": [f"{n}.png"] if n in MISSING else []} for n in range(ROWS)]
    manifest = write(tmp_path / request.param, rows)
    first = run(manifest, {"flaky_every": 10}, retries=0)
    assert codes(first) == dict.fromkeys(FLAKY, "engine_error") | dict.fromkeys(MISSING, "missing_file")
    assert "such as row 0: " in str(first)
    return tmp_path / "m-batchvl"


def test_rows_with_a_retryable_failure(out):
    before = records(out)
    [summary] = retry(out)
    assert (summary.rows, summary.ok, summary.failed, summary.resumed, summary.exit_code) == (60, 57, 3, 54, 3)
    assert codes(summary) == dict.fromkeys(MISSING, "missing_file")
    assert [responses(summary)[n] for n in sorted(FLAKY)] == [f"q {n}" for n in sorted(FLAKY)]
    after = records(out)
    assert before.items() <= after.items(), "earlier results are kept"
    assert {row["row"] for name in after.keys() - before.keys() for row in after[name]} == FLAKY
    assert retry(out) == [], "no retryable failure is left"


def test_codes_and_all(out, tmp_path):
    for n in MISSING:
        make_image(tmp_path / f"{n}.png", n)
    [summary] = retry(out, codes=["missing_file"])
    assert codes(summary) == dict.fromkeys(FLAKY, "engine_error")
    assert (summary.ok, summary.exit_code) == (54, 3)
    [summary] = retry(out, {"fail_every": 20}, all=True, retries=0)
    assert codes(summary) == {0: "engine_error", 20: "engine_error", 40: "engine_error"}
    [summary] = retry(out, all=True)
    assert (summary.ok, summary.exit_code, codes(summary)) == (60, 0, {})


def test_a_later_failure_wins_over_an_earlier_one(out, tmp_path):
    for n in MISSING:
        (tmp_path / f"{n}.png").write_bytes(b"<html>")
    [summary] = retry(out, codes=["missing_file"])
    assert {n: code for n, code in codes(summary).items() if n in MISSING} == dict.fromkeys(MISSING, "not_an_image")


def test_a_killed_retry_is_resumed_and_retries_no_row_twice(tmp_path):
    manifest, rows = questions(tmp_path / "m.jsonl", 900), 900
    out = tmp_path / "m-batchvl"
    assert run(manifest, {"flaky_every": 1}, retries=0).failed == rows
    words = command(None, "--quiet", "--batch-size", "4", fake={"delay": 0.05, "rows": 8})
    words[words.index("run")] = "retry"
    words[words.index("--engine") : words.index("--engine") + 2] = [str(out)]
    process = subprocess.Popen(words, env=environment())
    wait_until(lambda: journalled(out) > 5000 or process.poll() is not None)
    process.kill()
    assert process.wait(PATIENCE) == -signal.SIGKILL
    [rest] = retry(out)
    assert 0 < rest.resumed < rows
    assert (rest.rows, rest.ok, rest.exit_code) == (rows, rows, 0)
    assert responses(rest) == [f"q {n}" for n in range(rows)]
    assert retry(out) == []


def test_a_run_that_is_not_complete(tmp_path):
    """A retry covers failed rows, and leaves those without a result to the run."""
    manifest, out = questions(tmp_path / "m.parquet", 1000), tmp_path / "m-batchvl"
    slow = {"flaky_every": 10, "delay": 0.05, "rows": 8}
    assert run(manifest, slow, retries=0, max_failures="3", batch_size=4).exit_code == 4
    done = {row["row"] for rows in records(out).values() for row in rows}
    assert len(done) < 1000
    [summary] = retry(out)
    assert (summary.failed, summary.rows, summary.exit_code) == (0, len(done), 0)
    assert summary.results is None
    rest = run(manifest)
    assert (rest.ok, rest.exit_code) == (1000, 0)
    assert len(responses(rest)) == 1000


def test_a_limited_run(tmp_path):
    manifest = questions(tmp_path / "m.parquet", 100)
    run(manifest, {"flaky_every": 10}, retries=0, limit=50)
    [summary] = retry(tmp_path / "m-batchvl")
    assert (summary.rows, summary.failed, summary.exit_code) == (50, 0, 0)
    assert len(responses(summary)) == 50


def test_all_shards_or_one(tmp_path):
    manifest, out = questions(tmp_path / "m.jsonl", 90), tmp_path / "m-batchvl"
    for index in range(3):
        run(manifest, {"flaky_every": 10}, retries=0, shard=f"{index}/3")
    [one] = retry(out, shard="1/3")
    assert (one.rows, one.failed) == (30, 0)
    others = retry(out)
    assert [(summary.rows, summary.failed) for summary in others] == [(30, 0), (30, 0)]
    batchvl.merge(out)
    assert {row["status"] for row in pq.read_table(out / "results.parquet").to_pylist()} == {"ok"}
    with pytest.raises(ResumeError, match="has 3 shards; --shard 0/4 is not one of them"):
        retry(out, shard="0/4")


def test_options_that_change_answers_stay_those_of_the_run(out, monkeypatch):
    monkeypatch.setenv("BATCHVL_SYSTEM", "Be brief.")
    monkeypatch.setenv("BATCHVL_RETRIES", "0")
    [summary] = retry(out, {"fail_every": 20})
    assert {n: code for n, code in codes(summary).items() if n in FLAKY} == dict.fromkeys((0, 20, 40), "engine_error")
    assert answers(summary)[0]["attempts"] == 1, "the variable of an option that changes no answer is used"
    with pytest.raises(OptionError, match="--temperature: not allowed, since it would change what an answer means"):
        retry(out, temperature=0.5)
    with pytest.raises(OptionError, match="--codes and --all"):
        retry(out, codes=["http_status"], all=True)
    with pytest.raises(OptionError, match=r"unknown error code nonsense; known codes: .*http_status"):
        retry(out, codes=["nonsense"])
    with pytest.raises(OptionError, match="--limit: not an option of retry"):
        retry(out, limit=3)


def test_a_manifest_that_has_moved_or_changed(out, tmp_path):
    [manifest] = tmp_path.glob("m.*")
    moved = tmp_path / "elsewhere" / manifest.name
    moved.parent.mkdir()
    manifest.rename(moved)
    with pytest.raises(OptionError, match=r"cannot find its manifest .*; specify it with --manifest"):
        retry(out)
    write(manifest, [{"prompt": f"other {n}", "images": []} for n in range(ROWS)])
    with pytest.raises(ResumeError, match="the manifest's contents"):
        retry(out)
    [summary] = retry(out, manifest=moved)
    assert summary.ok == 57


def test_a_directory_that_is_no_output(tmp_path):
    with pytest.raises(ResumeError, match=r"not a batchvl output: no run\.json found"):
        batchvl.retry(tmp_path)


def test_the_command(out):
    done = shell([*command(None)[:3], "retry", str(out), "--accept-failures", "3", "--image-workers", "1"])
    assert (done.returncode, done.stdout) == (0, "")
    assert "retrying 6 failed rows" in done.stderr
    assert "60 rows done: 57 ok, 3 failed" in done.stderr
    nothing = shell([*command(None)[:3], "retry", str(out)])
    assert nothing.returncode == 0
    assert "no failed row to retry" in nothing.stderr
    refused = shell([*command(None)[:3], "retry", str(out), "--temperature", "1"])
    assert refused.returncode == 2
