"""The command line as the shell sees it."""

import subprocess
import sys

import pytest

from batchvl.config.options import all_fields, flag

HEAVY = ("torch", "transformers", "lmdeploy", "pyarrow", "aiohttp", "numpy", "PIL")


def batchvl(*arguments, **settings):
    return subprocess.run([sys.executable, "-m", "batchvl", *arguments], capture_output=True, text=True, **settings)


def test_help_imports_nothing_heavy():
    code = f"""
import sys
from click.testing import CliRunner
from batchvl.cli import main
for arguments in (["--help"], ["run", "--help"]):
    assert CliRunner().invoke(main, arguments).exit_code == 0
print([name for name in {HEAVY!r} + ("pyarrow.dataset",) if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_is_a_flag_with_help():
    text = batchvl("run", "--help").stdout
    for field in all_fields():
        assert flag(field.name) in text
        assert field.metadata["help"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.parquet"], "nowhere.parquet"),
        (["run"], "no manifest"),
        (["run", "x.jsonl", "--shard", "3/3"], "--shard: '3/3' is no shard: want I/N"),
        (["run", "x.jsonl", "--max-image-bytes", "many"], "--max-image-bytes: 'many' is no size"),
        (["run", "x.jsonl", "--top-p", "2"], "--top-p: want a number <= 1.0; found '2'"),
        (["run", "x.jsonl", "--accept-failures", "few"], "'few' is no bound on failures"),
        (["run", "x.jsonl", "--engine-option", "delay"], "--engine-option: 'delay'"),
        (["run", "x.jsonl", "--allow-private", "home"], "'home'"),
    ],
)
def test_bad_usage_exits_2_and_says_what_was_found(arguments, words, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "hi"}\n')
    done = batchvl(*arguments, "--engine", "fake", cwd=tmp_path) if len(arguments) > 1 else batchvl(*arguments)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*batchvl*")), "nothing was run, so nothing may be left behind"
