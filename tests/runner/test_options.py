"""The sources of options and their precedence, job files, and the default output."""

import json
import os
from pathlib import Path

import pytest

import batchvl
from batchvl.config.options import RunOptions
from batchvl.config.units import Duration
from batchvl.engines.registry import engine_spec
from batchvl.errors import OptionError

from .running import answers, command, environment, questions, run, shell


@pytest.fixture(autouse=True)
def without_variables(monkeypatch):
    for name in os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)


def options_of(out) -> dict:
    """Return the options in run.json of an output directory."""
    return json.loads((Path(out) / "run.json").read_text())["options"]


def test_precedence_of_the_sources(tmp_path, monkeypatch):
    manifest = questions(tmp_path / "m.jsonl", 3)
    out = (str(tmp_path / f"out{n}") for n in range(9))
    assert options_of(run(manifest, output=next(out)).output)["seed"] == 0

    (tmp_path / "batchvl.toml").write_text("seed = 1\nmax-new-tokens = 11\nstop = ['a', 'b']\nnumber_images = true\n")
    options = options_of(run(manifest, output=next(out)).output)
    assert (options["seed"], options["max_new_tokens"], options["stop"]) == (1, 11, ["a", "b"])
    assert options["number_images"] is True

    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/nightly.toml").write_text("seed = 2\n")
    options = options_of(run(manifest, output=next(out), config=tmp_path / "jobs/nightly.toml").output)
    assert (options["seed"], options["max_new_tokens"]) == (2, 512), "only one job file is read"

    monkeypatch.setenv("BATCHVL_SEED", "3")
    monkeypatch.setenv("BATCHVL_STOP", "###")
    monkeypatch.setenv("BATCHVL_SYSTEM", "")
    options = options_of(run(manifest, output=next(out)).output)
    assert (options["seed"], options["max_new_tokens"], options["stop"]) == (3, 11, ["###"])
    assert options["system"] is None, "an empty variable counts as not set"
    options = options_of(run(manifest, output=next(out), config=str(tmp_path / "jobs/nightly.toml")).output)
    assert options["seed"] == 3

    done = shell(
        command(manifest, "--seed", "4", "--no-number-images", "-o", str(tmp_path / "flags")),
        env=environment(BATCHVL_SEED="3"),
    )
    assert done.returncode == 0, done.stderr
    options = options_of(tmp_path / "flags")
    assert (options["seed"], options["max_new_tokens"], options["number_images"]) == (4, 11, False)


def test_the_model(tmp_path, monkeypatch):
    manifest = questions(tmp_path / "m.jsonl", 2)

    def model(name, **options):
        summary = run(manifest, output=tmp_path / name, **options)
        assert summary.engine is not None
        return summary.engine.model

    assert model("a") == "OpenGVLab/InternVL-Chat-V1-5"
    (tmp_path / "batchvl.toml").write_text("model = 'from/the-file'\n")
    assert model("b") == "from/the-file"
    monkeypatch.setenv("BATCHVL_MODEL", "from/the-environment")
    assert model("c") == "from/the-environment"
    assert model("d", model="from/the-flag") == "from/the-flag"
    assert model("e", model="shapes") == "shapes", "the built-in model is used only if named"
    assert (Path(engine_spec(RunOptions.of(model="shapes", engine="fake")).model) / "config.json").is_file()


def test_a_job_file_that_names_the_manifest(tmp_path, monkeypatch):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "data").mkdir()
    questions(tmp_path / "data/m.jsonl", 4, site="x")
    job = tmp_path / "jobs/nightly.toml"
    (tmp_path / "images").mkdir()
    job.write_text("manifest = '../data/m.jsonl'\noutput = '../out'\nkeep = 'site'\nimage_root = ['../images']\n")
    monkeypatch.chdir("/")
    summary = run(None, config=job)
    assert Path(summary.output).resolve() == tmp_path / "out"
    assert [row["site"] for row in answers(summary)] == ["x"] * 4
    other = questions(tmp_path / "data/other.jsonl", 2, site="y")
    assert run(other, config=job, output=tmp_path / "second").rows == 2, "the argument has precedence"
    done = shell(command(None, "--config", str(job)), cwd="/")
    assert done.returncode == 0, done.stderr
    assert "nothing left to do" in done.stderr


def test_errors_name_the_source_of_an_invalid_value(tmp_path, monkeypatch):
    manifest = questions(tmp_path / "m.jsonl", 2)
    with pytest.raises(OptionError, match=r"^--top-p: expected a number <= 1.0; found 2$"):
        run(manifest, top_p=2)
    (tmp_path / "batchvl.toml").write_text("fetch_timeout = 'soon'\n")
    with pytest.raises(OptionError, match=r"batchvl\.toml: fetch_timeout: expected a duration .*; found 'soon'$"):
        run(manifest)
    (tmp_path / "batchvl.toml").write_text("modell = 'x'\n")
    with pytest.raises(OptionError, match=r"batchvl\.toml: unknown option 'modell'"):
        run(manifest)
    (tmp_path / "batchvl.toml").write_text("model = \n")
    with pytest.raises(OptionError, match=r"batchvl\.toml: not valid TOML: .*line 1"):
        run(manifest)
    (tmp_path / "batchvl.toml").unlink()
    monkeypatch.setenv("BATCHVL_LIMIT", "few")
    with pytest.raises(OptionError, match=r"^BATCHVL_LIMIT: expected a whole number; found 'few'$"):
        run(manifest)
    monkeypatch.delenv("BATCHVL_LIMIT")
    with pytest.raises(OptionError, match=r"--engine: expected one of .*fake; found 'vllm'"):
        batchvl.run(manifest, engine="vllm")
    with pytest.raises(OptionError, match="no manifest"):
        batchvl.run()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.jsonl"]


def test_the_default_output_is_next_to_the_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    questions(tmp_path / "data/day.jsonl", 2)
    assert run("data/day.jsonl").output == "data/day-batchvl"
    assert run(Path("data/day.jsonl"), output=Path("here")).output == "here"
    assert run("data/").output == "data-batchvl"
    assert run("data/*.jsonl").output == "data/manifest-batchvl"


@pytest.mark.parametrize("name", ["row_timeout", "hang_timeout", "start_timeout", "fetch_timeout", "prepare_timeout"])
def test_a_time_limit_of_0_is_invalid(name):
    """Elsewhere, 0 often means no limit; here it would fail every row."""
    with pytest.raises(OptionError, match=f"--{name.replace('_', '-')}: .*expected a duration above 0"):
        RunOptions.of(**{name: "0"})


@pytest.mark.parametrize("value", ["80", "1", "0", "inf"])
def test_the_share_of_gpu_memory_is_below_1(value):
    """LMDeploy interprets 80 as a number of blocks."""
    with pytest.raises(OptionError, match="--cache-max-entry-count"):
        RunOptions.of(cache_max_entry_count=value)


def test_a_job_file_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match=r"nowhere\.toml: cannot read the job file: No such file"):
        batchvl.run("m.jsonl", config=str(tmp_path / "nowhere.toml"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(3600, "1h"), (5400, "90m"), (90, "90s"), (0.5, "0.5s"), (0, "0s"), (300, "5m")]
)
def test_durations_are_shown_in_the_largest_whole_unit(seconds, text):
    assert str(Duration(seconds)) == text
    assert Duration.parse(text) == seconds
