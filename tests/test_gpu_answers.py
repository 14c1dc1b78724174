"""The checks of benchmarks/gpu_answers.py: every kind of problem of an output is found and classified."""

import sys
from random import Random

import pytest

from benchmarks import gpu_answers
from benchmarks.answers import check, kind_of, swaps_seen


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    directory = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_answers, "ProcessPoolExecutor", NoProcesses)
        return gpu_answers.make_manifest(directory, 600, seed=1)[1]


class NoProcesses:
    """A pool of processes that does nothing: the checks need no images."""

    def __init__(self, count):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, *_, **__):
        return ()


@pytest.fixture
def results(rows):
    """The results of a perfect run."""
    return [perfect(number, row) for number, row in enumerate(rows)]


def perfect(number, row):
    truth = row["truth"]
    if truth is None:
        error = {"code": row["id"], "message": "as expected"}
        return {"row": number, "id": row["id"], "status": "failed", "response": None, "responses": None, "error": error}
    texts = {"response": f" {truth[-1]}\n", "responses": list(truth) if len(truth) > 1 else None}
    return {"row": number, "id": row["id"], "status": "ok", "error": None, **texts}


def select(kind, results):
    return [result for result in results if result["id"].rpartition("-")[0] == kind]


def exchange(first, second):
    for name in ("response", "responses"):
        first[name], second[name] = second[name], first[name]


def test_every_kind_of_row_occurs_and_no_caption_twice(rows):
    kinds = {row["id"].rpartition("-")[0] for row in rows}
    assert kinds >= {"caption", "count", "colour", "shape", "background", "is_there", "pair", "talk"}
    assert {(len(row["images"]), isinstance(row["prompt"], list)) for row in rows} == {
        (1, False),
        (2, False),
        (1, True),
    }
    captions = [row["truth"][-1] for row in rows if row["id"][-5:].isdigit() and kind_of(row["truth"][-1]) == "caption"]
    assert len(set(captions)) == len(captions) > 200
    assert None not in {kind_of(text) for row in rows for text in row["truth"] or ()}
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_perfect_run_has_no_faults(rows, results):
    findings = check(rows, results)
    assert (findings.right, findings.rows, findings.faults()) == (len(rows) - 3, len(rows) - 3, [])
    assert findings.proven > len(rows) / 3
    assert findings.failed == {"missing_file": 1, "corrupt_image": 1, "forbidden_address": 1}


def test_a_single_swap_of_captions_is_reported(rows, results):
    first, second = select("caption", results)[-2:]
    exchange(first, second)
    findings = check(rows, results)
    assert findings.faults() == ["2 swapped"]
    assert [line.partition(":")[0] for line in findings.swapped] == [first["id"], second["id"]]
    assert f"{first['response'].strip()!r} is what {second['id']} expects" in findings.swapped[0]


def test_a_swap_of_conversations_is_reported(rows, results):
    first, second = select("talk", results)[:2]
    exchange(first, second)
    assert len(check(rows, results).swapped) == 2


def test_a_swap_of_short_answers_of_two_kinds_is_reported(rows, results):
    exchange(select("count", results)[0], select("pair", results)[0])
    findings = check(rows, results)
    assert len(findings.swapped) == 2
    assert "is not a number but another row's image" in "".join(findings.swapped)


def test_another_row_s_id_is_a_swap(rows, results):
    results[7]["id"], results[8]["id"] = results[8]["id"], results[7]["id"]
    assert len(check(rows, results).swapped) == 2


def test_wrong_answers_are_not_swaps(rows, results):
    changed = select("count", results)[:2] + select("caption", results)[:1] + select("talk", results)[:1]
    for result, text in zip(changed, ("4", "2 or 3", "a pink cat on a red background", "no idea"), strict=True):
        result["response"] = text
    changed[-1]["responses"][-1] = "no idea"
    findings = check(rows, results)
    assert (len(findings.wrong), findings.swapped) == (4, [])
    assert findings.faults() == [f"only {findings.rows - 4} of {findings.rows} rows are right"]
    assert "'no idea', expected 'a" in "".join(findings.wrong)


def test_a_missing_turn_is_wrong(rows, results):
    select("talk", results)[0]["responses"].pop()
    assert len(check(rows, results).wrong) == 1


def test_missing_duplicate_and_unknown_rows_are_reported(rows, results):
    removed = results.pop(3)
    results += [results[10], {**results[11], "row": len(rows)}]
    findings = check(rows, results)
    assert findings.missing == [removed["id"]]
    assert findings.doubled == [f"row {results[10]['row']}: 2 times", f"row {len(rows)}: is not in the manifest"]
    assert {"1 missing", "2 doubled"} <= set(findings.faults())


def test_good_rows_that_failed_and_bad_rows_that_did_not_are_reported(rows, results):
    good, wrong_code, answered = (
        select("pair", results)[0],
        *(r for r in results if r["id"].startswith(("mis", "corr"))),
    )
    good.update(status="failed", response=None, error={"code": "engine_crashed", "message": "killed"})
    wrong_code["error"] = {"code": "engine_failed", "message": "another failure"}
    answered.update(status="ok", response="a cat", error=None)
    findings = check(rows, results)
    assert len(findings.misfailed) == 3
    assert "3 misfailed" in findings.faults()
    assert findings.failed == {"engine_crashed": 1, "engine_failed": 1, "forbidden_address": 1}


def test_nearly_every_swap_would_be_noticed(rows):
    seen = swaps_seen(rows, Random(0))
    assert seen.total() == 1000
    assert seen["named"] > 800
    assert seen["hidden"] < 50


@pytest.mark.slow
def test_an_engine_with_meaningless_answers_does_not_pass(monkeypatch, capsys):
    """The real command with the fake engine, killed once."""
    options = ["--engine", "fake", "--scenes", "600", "--kills", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_answers.py", *options])
    monkeypatch.setattr(gpu_answers.signal, "signal", lambda *_: None)
    assert gpu_answers.main() == 1
    output = capsys.readouterr().out
    assert "fake: only 0 of" in output
    assert "0 rows differ from the undisturbed run" in output
    assert "swapped:" not in output
    assert "kills" not in output.rpartition("Problems:")[2]
