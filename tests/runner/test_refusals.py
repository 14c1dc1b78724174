"""A wrong command is refused before a model is loaded, and leaves nothing behind."""

import gzip
import os

import pytest

from batchvl.errors import ManifestError, OptionError, ResumeError

from ..manifest.writing import write, write_bytes
from .running import children, command, questions, run, shell

GOOD = [{"prompt": "hi", "site": "a"}, {"prompt": "ho", "site": "b"}]


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def refused(manifest, error, *words, **options):
    """Assert that the run is refused with these words, and writes nothing next to the manifest."""
    before = names(manifest.parent)
    with pytest.raises(error) as raised:
        run(manifest, **options)
    for word in words:
        assert word in str(raised.value)
    assert raised.value.exit_code == 2
    assert names(manifest.parent) == before
    assert not children()


def test_manifests_that_cannot_be_read(tmp_path):
    refused(tmp_path / "none.parquet", ManifestError, "none.parquet", "no such file")
    refused(write_bytes(tmp_path / "empty.jsonl", b""), ManifestError, "empty.jsonl", "empty")
    refused(write_bytes(tmp_path / "m.txt", b"hi"), ManifestError, "m.txt", ".parquet, .jsonl")
    whole = write(tmp_path / "cut.parquet", GOOD)
    whole.write_bytes(whole.read_bytes()[:-20])
    refused(whole, ManifestError, "cut.parquet")
    refused(write_bytes(tmp_path / "bad.jsonl", b"prompt,site\n" * 20), ManifestError, "line 1", "JSON")
    cut = write(tmp_path / "cut.jsonl.gz", [{"prompt": os.urandom(50).hex()} for _ in range(100)])
    cut.write_bytes(gzip.compress(b"")[:5])
    refused(cut, ManifestError, "cut.jsonl.gz")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", ManifestError, "pipe.jsonl", "file")


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.csv"])
def test_columns(name, tmp_path):
    manifest = write(tmp_path / name, GOOD)
    refused(manifest, ManifestError, "'question'", "'prompt'", "'site'", prompt_column="question")
    refused(manifest, ManifestError, "'town'", "--keep", keep=["town"])
    refused(manifest, ManifestError, "{town}", "'site'", prompt="where is {town}?")
    twice = write(tmp_path / f"twice-{name}", [{"id": "a", "prompt": str(n % 7)} for n in range(30)])
    refused(twice, ManifestError, "rows 0 and 1", "same id 'a'", "--id-column")
    taken = write(tmp_path / f"taken-{name}", [{"prompt": "hi", "response": "ho"}])
    refused(taken, OptionError, "--keep response", keep=["response"])


def test_types(tmp_path):
    refused(write(tmp_path / "m.parquet", [{"prompt": 3}]), ManifestError, "'prompt'", "int64", "string")
    refused(write(tmp_path / "n.parquet", [{"prompt": "a", "id": 0.5}]), ManifestError, "'id'", "double")


def test_options(tmp_path):
    manifest = write(tmp_path / "m.parquet", GOOD)
    refused(manifest, OptionError, "'velocity'", velocity=3)
    refused(manifest, OptionError, "--limit", "0", limit=0)
    refused(manifest, OptionError, "'lots'", "a number (100)", accept_failures="lots")
    refused(manifest, OptionError, "--max-failures", "'-3'", max_failures="-3")
    refused(manifest, OptionError, "5/5", "0 <= I < N", shard="5/5")
    refused(manifest, OptionError, "no/where.toml", config="no/where.toml")


@pytest.mark.parametrize("shard", ["0/1", "1/2"])
def test_an_engine_that_refuses_leaves_no_output_and_no_settings(shard, tmp_path):
    """Rows that fail before the engine is up are recorded only once it is up."""
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "what?", "image": "missing.png"}] * 30)
    before = names(tmp_path)
    with pytest.raises(OptionError, match="needs a GPU"):
        run(manifest, {"refuse": "needs a GPU", "start_delay": 0.3}, shard=shard, model="some/typo")
    with pytest.raises(OptionError, match="velocity"):
        run(manifest, {"velocity": 1}, shard=shard)
    assert names(tmp_path) == before
    assert not children()
    ours = tmp_path / "ours"
    ours.mkdir()
    (ours / "note.txt").write_text("there before")
    with pytest.raises(OptionError, match="needs a GPU"):
        run(manifest, {"refuse": "needs a GPU"}, shard=shard, output=ours)
    assert names(ours) == ["note.txt"]
    summary = run(manifest, shard=shard, output=ours, model="the/right-one", accept_failures="100%")
    assert (summary.exit_code, summary.rows) == (0, 30 if shard == "0/1" else 15)
    with pytest.raises(OptionError):
        run(write(tmp_path / "o.jsonl", GOOD), {"refuse": "too late"}, output=tmp_path / "kept", shard="0/2")
    run(write(tmp_path / "o.jsonl", GOOD), output=tmp_path / "kept", shard="0/2")
    with pytest.raises(OptionError):
        run(tmp_path / "o.jsonl", {"refuse": "too late"}, output=tmp_path / "kept", shard="1/2")
    assert "run.json" in names(tmp_path / "kept"), "another shard's answers need it"
    assert run(tmp_path / "o.jsonl", output=tmp_path / "kept", shard="0/2").resumed == 1


def test_the_output_of_another_run_is_not_changed(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 20)
    assert run(manifest).exit_code == 0
    out = tmp_path / "m-batchvl"
    there = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    for changed, flag in (
        ({"max_new_tokens": 9}, "--max-new-tokens"),
        ({"model": "other/one"}, "--model"),
        ({"prompt": "again: {prompt}"}, "--prompt"),
        ({"shard": "0/2"}, "--shard"),
    ):
        with pytest.raises(ResumeError, match=flag):
            run(manifest, **changed)
    manifest.write_text(manifest.read_text() + '{"prompt": "one more"}\n')
    with pytest.raises(ResumeError, match="manifest's contents"):
        run(manifest)
    assert there == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_the_command_prints_one_line_and_exits_with_2(tmp_path):
    manifest = write(tmp_path / "m.parquet", GOOD)
    for arguments in (
        command(manifest, "--prompt-column", "question"),
        command(manifest, fake={"refuse": "needs a GPU"}),
        command(manifest, "-o", "/proc/nowhere"),
        command(manifest, "-o", str(manifest)),
    ):
        done = shell(arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("Error: ")
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert names(tmp_path) == ["m.parquet"]


def test_a_run_that_dies_before_its_first_answer_leaves_no_settings(tmp_path):
    """It is no usage error, since the machine may be the cause; but a corrected command must not be refused."""
    manifest = write(tmp_path / "m.jsonl", GOOD)
    summary = run(manifest, {"die_on": [0, 1]})
    assert summary.exit_code == 1
    assert "2 times before its first answer" in summary.message
    assert "as configured" in summary.message, "the last output of the engine"
    corrected = run(manifest, max_new_tokens=64)
    assert (corrected.exit_code, corrected.ok) == (0, 2)
