"""The command line, as a shell sees it."""

import os
import subprocess
import sys

import pytest

from batchvl.config.options import all_fields, flag

HEAVY = ("torch", "transformers", "lmdeploy", "pyarrow", "aiohttp", "numpy", "PIL", "psutil", "pynvml")


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


@pytest.mark.parametrize("command", ["run", "bench"])
def test_every_option_is_a_flag_with_help(command):
    text = batchvl(command, "--help").stdout
    for field in all_fields():
        assert flag(field.name) in text
        assert field.metadata["help"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.parquet"], "nowhere.parquet"),
        (["run"], "no manifest"),
        (["run", "x.jsonl", "--shard", "3/3"], "--shard: expected I/N with 0 <= I < N, such as 0/8; found '3/3'"),
        (["run", "x.jsonl", "--max-image-bytes", "many"], "--max-image-bytes: expected a size, such as 500000 (bytes)"),
        (["run", "x.jsonl", "--top-p", "2"], "--top-p: expected a number <= 1.0; found '2'"),
        (
            ["run", "x.jsonl", "--accept-failures", "few"],
            "expected a number (100) or a percentage (1%) of rows; found 'few'",
        ),
        (["run", "x.jsonl", "--engine-option", "delay"], "--engine-option: expected KEY=VALUE, found 'delay'"),
        (["run", "x.jsonl", "--allow-private", "home"], "'home'"),
    ],
)
def test_invalid_usage_exits_with_2_and_a_message(arguments, message, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"prompt": "hi"}\n')
    done = batchvl(*arguments, "--engine", "fake", cwd=tmp_path) if len(arguments) > 1 else batchvl(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*batchvl*")), "nothing was run, so no output may exist"


COMMANDS = ("run", "fetch", "retry", "status", "merge", "validate", "bench", "doctor", "demo")


def test_every_command_is_listed_in_order_of_importance():
    lines = batchvl("--help").stdout.partition("Commands:\n")[2].splitlines()
    assert tuple(line.split()[0] for line in lines) == COMMANDS


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_the_terminal_and_ends_with_exit_codes(command, columns):
    text = batchvl(command, "--help", env={**os.environ, "COLUMNS": str(columns)}).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert text.startswith(f"Usage: batchvl {command} [OPTIONS]")
    assert "\nExit codes:\n  0 " in text
    assert "None" not in text


def test_a_switch_can_be_turned_off():
    done = batchvl("run", "x.jsonl", "--no-number-images", "--engine", "fake")
    assert "x.jsonl" in done.stderr, "the option was accepted, and the manifest is missing"
