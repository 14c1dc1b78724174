"""Engines that die or hang: the row to blame is found and fails, and all others are answered."""

import pytest

from .running import answers, children, codes, questions, responses, run


def check(summary, rows, *poison):
    assert responses(summary) == [None if n in poison else f"q {n}" for n in range(rows)]
    assert codes(summary) == dict.fromkeys(poison, "engine_crashed")
    assert summary.exit_code == (3 if poison else 0)
    assert not children()


@pytest.mark.parametrize(("poison", "size"), [([17], 1), ([0], 32), ([40, 299], 8)])
def test_poison_rows(poison, size, tmp_path):
    rows = 300
    summary = run(questions(tmp_path / "m.jsonl", rows), {"die_on": poison}, batch_size=size)
    check(summary, rows, *poison)
    [message] = {row["error"]["message"].split(":")[0] for row in answers(summary) if row["error"]}
    assert message == "the engine died twice, the last time over this row alone"
    assert summary.engine_deaths <= len(poison) * 12
    assert "the engine died" in str(summary)


def test_poison_in_a_manifest_that_fits_the_engine(tmp_path):
    check(run(questions(tmp_path / "m.jsonl", 10), {"die_on": [0]}, batch_size=32), 10, 0)
    check(run(questions(tmp_path / "n.jsonl", 10), {"die_on": [9]}, batch_size=32), 10, 9)


@pytest.mark.parametrize("after", [13, 60])
def test_no_row_fails_if_the_engine_dies_now_and_then(after, tmp_path):
    behaviour = {"die_after": after, "delay": 0.001, "spread": 0.03}
    summary = run(questions(tmp_path / "m.jsonl", 120), behaviour, batch_size=8)
    check(summary, 120)
    assert summary.engine_deaths >= 120 // after - 1


def test_a_row_over_which_the_engine_hangs(tmp_path):
    summary = run(questions(tmp_path / "m.jsonl", 40), {"hang_on": [20], "rows": 2}, hang_timeout="0.6s", batch_size=2)
    check(summary, 40, 20)
    [message] = [row["error"]["message"] for row in answers(summary) if row["error"]]
    assert "no progress for 0.6 s" in message


def test_an_engine_that_always_dies_ends_the_run_and_its_last_output_is_shown(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 100)
    summary = run(manifest, {"die_on": list(range(100))})
    assert (summary.exit_code, summary.rows, summary.engine_deaths) == (1, 0, 2)
    assert "SIGKILL" in summary.message
    assert "as configured" in summary.message
    assert summary.results is None
    assert not children()


def test_an_engine_that_dies_for_good_in_the_middle_keeps_what_was_answered(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 64)
    summary = run(manifest, {"die_on": list(range(8, 64)), "rows": 8}, batch_size=8)
    assert (summary.exit_code, summary.ok, summary.failed) == (1, 8, 0)
    assert "5 times without an answer" in summary.message
    rest = run(manifest, batch_size=8)
    assert (rest.resumed, rest.exit_code) == (8, 0)
    assert responses(rest) == [f"q {n}" for n in range(64)]
    assert not children()
