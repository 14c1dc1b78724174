"""The demo, and the example manifests, which it generates."""

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
    directory = tmp_path_factory.mktemp("drawn")
    return directory, demo.draw(directory)


@pytest.fixture(scope="module")
def answered(drawn):
    """The rows and the results of a perfect model: FakeEngine's, with the truth in place of its answers."""
    directory, rows = drawn
    summary = batchvl.run(directory / demo.MANIFEST, engine="fake", keep=("truth",), quiet=True)
    assert summary.exit_code == 3
    results = pq.read_table(summary.results).to_pylist()
    for result in results:
        if result["truth"]:
            result["responses"] = result["truth"] if len(result["truth"]) > 1 else None
            result["response"] = result["truth"][-1]
    return rows, results


def test_the_committed_manifests_are_up_to_date(drawn):
    directory, _ = drawn
    fix = "run: python manifests/make.py"
    assert (MANIFESTS / "shapes.jsonl").read_bytes() == (directory / "shapes.jsonl").read_bytes(), fix
    assert pq.read_table(MANIFESTS / "shapes.parquet").equals(pq.read_table(directory / "shapes.parquet")), fix
    names = {path.name for path in (directory / demo.IMAGES).iterdir()}
    assert names == {path.name for path in (MANIFESTS / demo.IMAGES).iterdir()}, fix
    for name in names - {"corrupt.jpg"}:
        new, committed = (Image.open(parent / demo.IMAGES / name) for parent in (directory, MANIFESTS))
        assert new.size == committed.size
        # Compare pixels, since the bytes depend on the version of zlib, and a JPEG's pixels slightly on libjpeg's.
        difference = max(high for _, high in ImageChops.difference(new, committed).getextrema())
        assert difference <= (8 if name.endswith(".jpg") else 0), f"{name}: {fix}"
    assert sum(path.stat().st_size for path in MANIFESTS.rglob("*") if path.is_file()) < 1_000_000


def test_make_py_writes_to_its_own_directory(tmp_path):
    script = tmp_path / "make.py"
    script.write_bytes((MANIFESTS / "make.py").read_bytes())
    runpy.run_path(str(script), run_name="__main__")
    assert {path.name for path in tmp_path.iterdir()} == {"make.py", "images", "shapes.jsonl", "shapes.parquet"}


def test_both_manifests_have_the_same_rows(drawn):
    directory, rows = drawn
    lines = [json.loads(line) for line in (directory / "shapes.jsonl").read_text().splitlines()]
    for line in lines:
        line["prompt"] = line["prompt"] if isinstance(line["prompt"], list) else [line["prompt"]]
    assert lines == pq.read_table(directory / "shapes.parquet").to_pylist() == rows
    assert {(len(row["images"]), len(row["prompt"])) for row in rows} == {(1, 1), (2, 1), (1, 3)}
    assert len({row["id"] for row in rows}) == len(rows)


def test_exactly_the_bad_rows_fail_each_with_its_own_error(answered):
    _, results = answered
    failed = {result["id"]: result["error"]["code"] for result in results if result["status"] == "failed"}
    assert failed == {code: code for code in demo.BAD_ROWS}


def test_the_report_of_correct_results_shows_every_kind_of_row(answered, capsys):
    rows, results = answered
    assert demo.report(rows, results)
    output = capsys.readouterr().out
    total = sum(len(row["truth"] or ()) for row in rows)
    assert f"{total} of {total} answers are correct" in output
    kinds = ("caption-", "count-", "colour-", "shape-", "background-", "is-there-", "pair-", "talk-")
    for name in (*kinds, *demo.BAD_ROWS):
        assert f"\n  {name}" in f"\n{output}"
    assert max(map(len, output.splitlines())) <= 120


def _wrong_answer(results):
    results[next(n for n, result in enumerate(results) if result["id"] == "count-01")]["response"] = "seven"
    return "count-01: expected '1', but the answer is 'seven'"


def _missing_turn(results):
    results[next(n for n, result in enumerate(results) if result["id"] == "talk-01")]["responses"].pop()
    return "talk-01: expected 'a "


def _good_row_failed(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "pair-01")]
    error = {"code": "engine_failed", "message": "no luck"}
    result.update(status="failed", response=None, error=error)
    return "pair-01: engine_failed: no luck"


def _other_error(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "forbidden_address")]
    result["error"] = {"code": "connection_failed", "message": "refused"}
    return "forbidden_address: connection_failed: refused"


def _bad_row_answered(results):
    result = results[next(n for n, result in enumerate(results) if result["id"] == "missing_file")]
    result.update(status="ok", response="a cat", error=None)
    return "missing_file: should have failed, but did not"


@pytest.mark.parametrize("alter", [_wrong_answer, _missing_turn, _good_row_failed, _other_error, _bad_row_answered])
def test_the_report_lists_unexpected_results(answered, alter, capsys):
    rows, results = answered
    altered = json.loads(json.dumps(results))
    message = alter(altered)
    assert not demo.report(rows, altered)
    assert message in capsys.readouterr().out


def test_only_a_new_or_empty_directory_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert demo.new_directory(Path("mine")) == Path("mine")
    (tmp_path / "mine" / "work.txt").write_text("keep me")
    with pytest.raises(OptionError, match="mine: directory is not empty"):
        demo.new_directory(Path("mine"))
    directories = []
    for _ in range(3):
        directories.append(demo.new_directory(None))
        directories[-1].mkdir()
    assert list(map(str, directories)) == ["batchvl-demo", "batchvl-demo-2", "batchvl-demo-3"]


def test_the_error_without_torch_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(EngineUnavailable, match=r"(?s)torch is not installed:.*pip install 'batchvl\[transformers\]'"):
        demo.demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()
