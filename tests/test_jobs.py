"""The nightly job: its job file, and its script run as Slurm would."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from batchvl.config.options import RunOptions
from batchvl.config.sources import read_job_file

from .timing import scaled

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "jobs" / "nightly.sbatch"


@pytest.fixture
def environment():
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("BATCHVL_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, "PATH": path, "SLURM_ARRAY_TASK_ID": "3", "BATCHVL_ENGINE": "fake"}


@pytest.fixture
def command(tmp_path):
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(f'{{"prompt": "row {number}"}}\n' for number in range(40)))
    return ["bash", str(SCRIPT), str(manifest), str(tmp_path / "out")]


def test_the_job_file_is_accepted():
    options = RunOptions.of(**read_job_file(ROOT / "jobs" / "nightly.toml"))
    assert options.output.accept_failures == "2%"
    assert options.sampling.max_new_tokens == 64


def test_commented_out_lines_are_valid_options(tmp_path):
    text = re.sub(r"^# (\w+ = )", r"\1", (ROOT / "jobs" / "nightly.toml").read_text(), flags=re.MULTILINE)
    (tmp_path / "all.toml").write_text(text)
    options = RunOptions.of(**read_job_file(tmp_path / "all.toml"))
    assert options.model.max_tiles == 6
    assert options.model.revision == "..."


def test_the_script_is_consistent():
    text = SCRIPT.read_text()
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    shards = re.search(r"^SHARDS=(\d+)$", text, re.MULTILINE)
    assert f"#SBATCH --array=0-{int(shards[1]) - 1}\n" in text
    for line in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {line}\n" in text


def test_the_script_runs_the_shard_of_its_task(tmp_path, environment, command):
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "5 rows done: 5 ok, 0 failed" in process.stderr
    assert [path.name for path in (tmp_path / "out").glob("shard-*")] == ["shard-00003-of-00008"]


def test_the_signal_before_the_time_limit_reaches_batchvl(tmp_path, environment, command):
    environment |= {"BATCHVL_ENGINE_OPTION": "delay=100", "BATCHVL_GRACE": "0.2"}
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen(command, cwd=ROOT, env=environment, stderr=out) as job:
        while "batches of" not in log.read_text():  # the engine is up
            assert job.poll() is None, log.read_text()
            time.sleep(0.05)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(timeout=scaled(30)) == 75, log.read_text()
    assert "stopped by SIGUSR1: run the same command again to resume" in log.read_text()
