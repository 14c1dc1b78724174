"""Progress of a run and its summary, on a terminal and in a log."""

import json
import re
from pathlib import Path

import pytest

from batchvl.results import ResultStore

from .running import command, on_a_terminal, questions, responses, run, shell


def test_a_bar_on_a_terminal_and_then_the_summary(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 400)
    run(manifest, limit=100)
    code, shown = on_a_terminal(command(manifest, fake={"delay": 0.05, "fail_every": 300, "rows": 32}))
    assert code == 3
    bars = re.findall(r"\r([^\r\n]*\d+%\|[^\r\n]*)", shown)
    assert "100/400" in bars[0], "resumes where the last run stopped"
    assert any("tokens/s" in bar and "failed" in bar for bar in bars)
    assert "400/400" in bars[-1]
    assert "400 rows done: 399 ok, 1 failed" in shown
    assert "1 engine_error" in shown
    assert "Traceback" not in shown


def test_a_line_now_and_then_without_a_terminal(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("batchvl.runner.progress.LOG_SECONDS", 0.05)
    manifest = questions(tmp_path / "m.jsonl", 300)
    run(manifest, limit=60)
    summary = run(manifest, {"start_delay": 0.3, "delay": 0.06, "rows": 32}, quiet=False)
    lines = capfd.readouterr().err.splitlines()
    assert any(line.startswith("starting the engine (") for line in lines)
    done = [
        re.fullmatch(
            r"(\d+) of (\d+) rows, [\d.]+ rows/s, \d+ tokens/s, 0 failed, engine waiting \d+%(, [\d:]+ left)?", line
        )
        for line in lines
    ]
    counts = [int(match[1]) for match in done if match]
    assert len(counts) > 2
    assert counts == sorted(counts)
    assert 60 <= counts[0] < 300
    assert [match[2] for match in done if match][-1] == "300", "the end of the manifest was read by then"
    assert summary.rows == 300
    assert not any("\r" in line or "%|" in line for line in lines), "no bar in a log"


def test_quiet_prints_nothing(tmp_path):
    done = shell(command(questions(tmp_path / "m.jsonl", 20), "--quiet", fake={"fail_every": 10}))
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")
    refused = shell(command(tmp_path / "none.jsonl", "-q"))
    assert "none.jsonl" in refused.stderr, "errors are printed all the same"


@pytest.mark.parametrize("shard", ["0/1", "1/2"])
def test_the_summary_is_the_same_everywhere(shard, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 100)
    summary = run(manifest, {"fail_every": 25, "die_on": [60]}, shard=shard, batch_size=4)
    directory = Path(summary.output) / ("shard-00001-of-00002" if shard == "1/2" else "")
    written = json.loads((directory / "summary.json").read_text())
    rows = 100 if shard == "0/1" else 50
    failures = {"engine_error": 4 if shard == "0/1" else 2, "engine_crashed": 1}
    for name, value in {
        "rows": rows,
        "ok": rows - sum(failures.values()),
        "failures": failures,
        "failed": sum(failures.values()),
        "exit_code": 3,
        "resumed": 0,
        "expected": rows,
        "engine_deaths": summary.engine_deaths,
        "results": summary.results,
        "message": summary.message,
    }.items():
        assert getattr(summary, name) == value
        assert written[name] == value, name
    assert written["engine"]["engine"] == "fake"
    assert set(written["mean_seconds"]) == {"fetch", "prepare", "engine", "waiting"}
    assert summary.output_tokens == 2 * summary.ok
    assert summary.seconds > 0
    text = str(summary)
    for words in (f"{rows} rows done", "engine_error", "engine_crashed", "the engine died", "rows/s", summary.output):
        assert words in text


def test_counts_of_a_resumed_run(tmp_path):
    manifest = questions(tmp_path / "m.parquet", 100)
    behaviour = {"fail_every": 10}
    first = run(manifest, behaviour, limit=50)
    assert (first.ok, first.failed, first.resumed, first.output_tokens) == (45, 5, 0, 90)
    rest = run(manifest, behaviour)
    assert (rest.ok, rest.failed, rest.resumed, rest.output_tokens) == (90, 10, 50, 90)
    assert rest.rows_per_second == pytest.approx(50 / rest.seconds, rel=0.01), "of this run only"
    assert "50 of them were done before this run" in str(rest)


def test_a_run_with_nothing_to_do_keeps_the_summary_of_the_one_that_did_the_work(tmp_path):
    manifest = questions(tmp_path / "m.parquet", 30)
    first = run(manifest)
    written = (Path(first.output) / "summary.json").read_bytes()
    again = run(manifest)
    assert (again.rows, again.resumed, again.exit_code) == (30, 30, 0)
    assert (Path(first.output) / "summary.json").read_bytes() == written


def test_a_missing_result_is_an_error(tmp_path, monkeypatch):
    manifest = questions(tmp_path / "m.parquet", 30)
    add = ResultStore.add

    def forgetful(self, record):
        if record.row != 17:
            add(self, record)

    monkeypatch.setattr(ResultStore, "add", forgetful)
    summary = run(manifest)
    assert summary.exit_code == 1
    assert "1 row has no result" in summary.message
    monkeypatch.undo()
    again = run(manifest)
    assert (again.exit_code, again.resumed, len(responses(again))) == (0, 29, 30)
