"""The demonstration and the manifests of the project, which are what it draws."""

import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops

import batchvl
from batchvl import demo
from batchvl.errors import EngineUnavailable, OptionError

MANIFESTS = Path(__file__).parents[1] / "manifests"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    return folder, demo.draw(folder)


@pytest.fixture(scope="module")
def answered(drawn):
    """Rows and the results that a perfect model would give: FakeEngine's, with the truth in place of its answers."""
    folder, rows = drawn
    summary = batchvl.run(folder / demo.MANIFEST, engine="fake", keep=("truth",), quiet=True)
    assert summary.exit_code == 3
    results = pq.read_table(summary.results).to_pylist()
    for result in results:
        if result["truth"]:
            result["responses"] = result["truth"] if len(result["truth"]) > 1 else None
            result["response"] = result["truth"][-1]
    return rows, results


def test_the_committed_manifests_are_what_the_code_makes(drawn):
    folder, _ = drawn
    run_me = "run: python manifests/make.py"
    assert (MANIFESTS / "shapes.jsonl").read_bytes() == (folder / "shapes.jsonl").read_bytes(), run_me
    assert pq.read_table(MANIFESTS / "shapes.parquet").equals(pq.read_table(folder / "shapes.parquet")), run_me
    pictures = {path.name for path in (folder / "pictures").iterdir()}
    assert pictures == {path.name for path in (MANIFESTS / "pictures").iterdir()}, run_me
    for name in pictures - {"corrupt.jpg"}:
        mine, committed = (Image.open(place / "pictures" / name) for place in (folder, MANIFESTS))
        assert mine.size == committed.size
        # Not the files' bytes: they change with the version of zlib, and a JPEG's pixels with that of libjpeg.
        most = max(high for _, high in ImageChops.difference(mine, committed).getextrema())
        assert most <= (8 if name.endswith(".jpg") else 0), f"{name}: {run_me}"
    assert sum(path.stat().st_size for path in MANIFESTS.rglob("*") if path.is_file()) < 1_000_000


def test_make_py_draws_into_its_own_folder(tmp_path):
    script = tmp_path / "make.py"
    script.write_bytes((MANIFESTS / "make.py").read_bytes())
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {"make.py", "pictures", "shapes.jsonl", "shapes.parquet"}


def test_both_manifests_hold_the_same_rows(drawn):
    folder, rows = drawn
    lines = [json.loads(line) for line in (folder / "shapes.jsonl").read_text().splitlines()]
    for line in lines:
        line["prompt"] = line["prompt"] if isinstance(line["prompt"], list) else [line["prompt"]]
    assert lines == pq.read_table(folder / "shapes.parquet").to_pylist() == rows
    assert {(len(row["images"]), len(row["prompt"])) for row in rows} == {(1, 1), (2, 1), (1, 3)}
    assert len({row["id"] for row in rows}) == len(rows)


def test_exactly_the_bad_rows_fail_each_for_its_own_reason(answered):
    _, results = answered
    failed = {result["id"]: result["error"]["code"] for result in results if result["status"] == "failed"}
    assert failed == {code: code for code in demo.BAD}


def test_the_report_shows_every_kind_of_row_and_is_content(answered, capsys):
    rows, results = answered
    assert demo.report(rows, results)
    said = capsys.readouterr().out
    total = sum(len(row["truth"] or ()) for row in rows)
    assert f"{total} of {total} answers are right" in said
    for word in ("caption-", "count-", "colour-", "shape-", "background-", "is-there-", "pair-", "talk-", *demo.BAD):
        assert f"\n  {word}" in f"\n{said}"
    assert max(map(len, said.splitlines())) <= 120


def _wrong_answer(results):
    results[next(n for n, result in enumerate(results) if result["id"] == "count-01")]["response"] = "seven"
    return "count-01: drawn was '1', the answer is 'seven'"


def _lost_turn(results):
    results[next(n for n, result in enumerate(results) if result["id"] == "talk-01")]["responses"].pop()
    return "talk-01: drawn was 'a "


def _good_row_failed(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "pair-01")]
    error = {"code": "engine_failed", "message": "no luck"}
    result.update(status="failed", response=None, error=error)
    return "pair-01: engine_failed: no luck"


def _other_reason(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "forbidden_address")]
    result["error"] = {"code": "connection_failed", "message": "refused"}
    return "forbidden_address: connection_failed: refused"


def _bad_row_answered(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "missing_file")]
    result.update(status="ok", response="a cat", error=None)
    return "missing_file: did not fail"


@pytest.mark.parametrize("spoil", [_wrong_answer, _lost_turn, _good_row_failed, _other_reason, _bad_row_answered])
def test_whatever_is_amiss_is_told(answered, spoil, capsys):
    rows, results = answered
    spoilt = json.loads(json.dumps(results))
    words = spoil(spoilt)
    assert not demo.report(rows, spoilt)
    assert words in capsys.readouterr().out


def test_a_folder_that_holds_something_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert demo.new_folder(Path("mine")) == Path("mine")
    (tmp_path / "mine" / "work.txt").write_text("keep me")
    with pytest.raises(OptionError, match="mine: is not empty"):
        demo.new_folder(Path("mine"))
    taken = []
    for _ in range(3):
        taken.append(demo.new_folder(None))
        taken[-1].mkdir()
    assert list(map(str, taken)) == ["batchvl-demo", "batchvl-demo-2", "batchvl-demo-3"]


def test_without_torch_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(EngineUnavailable, match=r"(?s)no torch:.*pip install 'batchvl\[transformers\]'"):
        demo.demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()
