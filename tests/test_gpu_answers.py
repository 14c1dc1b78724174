"""The checks of benchmarks/gpu_answers.py: each way in which an output can be wrong is told, and told apart."""

import sys
from random import Random

import pytest

from benchmarks import gpu_answers
from benchmarks.answers import check, sort_of, swaps_seen


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_answers, "ProcessPoolExecutor", NoProcesses)
        return gpu_answers.make_manifest(folder, 600, seed=1)[1]


class NoProcesses:
    """Stands in for a pool of processes, and does nothing: the checks need no pictures."""

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
    """A perfect run's."""
    return [perfect(number, row) for number, row in enumerate(rows)]


def perfect(number, row):
    truth = row["truth"]
    if truth is None:
        error = {"code": row["id"], "message": "as it must"}
        return {"row": number, "id": row["id"], "status": "failed", "response": None, "responses": None, "error": error}
    texts = {"response": f" {truth[-1]}\n", "responses": list(truth) if len(truth) > 1 else None}
    return {"row": number, "id": row["id"], "status": "ok", "error": None, **texts}


def of_kind(kind, results):
    return [result for result in results if result["id"].rpartition("-")[0] == kind]


def exchange(first, second):
    for name in ("response", "responses"):
        first[name], second[name] = second[name], first[name]


def test_every_kind_of_row_is_asked_and_no_caption_twice(rows):
    kinds = {row["id"].rpartition("-")[0] for row in rows}
    assert kinds >= {"caption", "count", "colour", "shape", "background", "is_there", "pair", "talk"}
    assert {(len(row["images"]), isinstance(row["prompt"], list)) for row in rows} == {
        (1, False),
        (2, False),
        (1, True),
    }
    fresh = [row["truth"][-1] for row in rows if row["id"][-5:].isdigit() and sort_of(row["truth"][-1]) == "caption"]
    assert len(set(fresh)) == len(fresh) > 200
    assert None not in {sort_of(text) for row in rows for text in row["truth"] or ()}
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_perfect_run_has_no_faults(rows, results):
    found = check(rows, results)
    assert (found.right, found.rows, found.faults()) == (len(rows) - 3, len(rows) - 3, [])
    assert found.proven > len(rows) / 3
    assert found.failed == {"missing_file": 1, "corrupt_image": 1, "forbidden_address": 1}


def test_one_swap_of_captions_is_named_though_nearly_all_are_right(rows, results):
    first, second = of_kind("caption", results)[-2:]
    exchange(first, second)
    found = check(rows, results)
    assert found.faults() == ["2 swapped"]
    assert [line.partition(":")[0] for line in found.swapped] == [first["id"], second["id"]]
    assert f"{first['response'].strip()!r} is what {second['id']} expects" in found.swapped[0]


def test_a_swap_of_conversations_is_named(rows, results):
    first, second = of_kind("talk", results)[:2]
    exchange(first, second)
    assert len(check(rows, results).swapped) == 2


def test_a_swap_of_short_answers_of_two_sorts_is_named(rows, results):
    exchange(of_kind("count", results)[0], of_kind("pair", results)[0])
    found = check(rows, results)
    assert len(found.swapped) == 2
    assert "is no number, but another row's image" in "".join(found.swapped)


def test_the_id_of_another_row_is_a_swap(rows, results):
    results[7]["id"], results[8]["id"] = results[8]["id"], results[7]["id"]
    assert len(check(rows, results).swapped) == 2


def test_wrong_answers_are_wrong_and_no_swaps(rows, results):
    spoilt = of_kind("count", results)[:2] + of_kind("caption", results)[:1] + of_kind("talk", results)[:1]
    for result, text in zip(spoilt, ("4", "2 or 3", "a pink cat on a red background", "no idea"), strict=True):
        result["response"] = text
    spoilt[-1]["responses"][-1] = "no idea"
    found = check(rows, results)
    assert (len(found.wrong), found.swapped) == (4, [])
    assert found.faults() == [f"only {found.rows - 4} of {found.rows} rows are right"]
    assert "'no idea', expected 'a" in "".join(found.wrong)


def test_a_turn_too_few_is_wrong(rows, results):
    of_kind("talk", results)[0]["responses"].pop()
    assert len(check(rows, results).wrong) == 1


def test_rows_missing_and_doubled_and_from_nowhere(rows, results):
    gone = results.pop(3)
    results += [results[10], {**results[11], "row": len(rows)}]
    found = check(rows, results)
    assert found.missing == [gone["id"]]
    assert found.doubled == [f"row {results[10]['row']}: 2 times", f"row {len(rows)}: is in no manifest"]
    assert {"1 missing", "2 doubled"} <= set(found.faults())


def test_good_rows_that_failed_and_bad_ones_that_did_not(rows, results):
    good, other, answered = of_kind("pair", results)[0], *(r for r in results if r["id"].startswith(("mis", "corr")))
    good.update(status="failed", response=None, error={"code": "engine_crashed", "message": "killed"})
    other["error"] = {"code": "engine_failed", "message": "no luck"}
    answered.update(status="ok", response="a cat", error=None)
    found = check(rows, results)
    assert len(found.misfailed) == 3
    assert "3 misfailed" in found.faults()
    assert found.failed == {"engine_crashed": 1, "engine_failed": 1, "forbidden_address": 1}


def test_nearly_every_swap_would_be_seen(rows):
    seen = swaps_seen(rows, Random(0))
    assert seen.total() == 1000
    assert seen["named"] > 800
    assert seen["hidden"] < 50


@pytest.mark.slow
def test_an_engine_that_answers_nonsense_does_not_pass(monkeypatch, capsys):
    """The real command with the fake engine, killed once."""
    options = ["--engine", "fake", "--scenes", "600", "--kills", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu_answers.py", *options])
    monkeypatch.setattr(gpu_answers.signal, "signal", lambda *_: None)
    assert gpu_answers.main() == 1
    said = capsys.readouterr().out
    assert "fake: only 0 of" in said
    assert "0 rows differ from the undisturbed run" in said
    assert "swapped:" not in said
    assert "kills" not in said.rpartition("Not as it should be:")[2]
