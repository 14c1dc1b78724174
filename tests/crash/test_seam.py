"""Kills between any two calls to the disk for journals, parts and renames, and in the middle of a write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..runner.running import environment


def kill(scratch: Path, *arguments: str) -> dict[str, int]:
    """Run `seam.py`, which checks what each kill leaves, and return its figures."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.crash.seam", str(scratch), *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment(),
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_some_calls(tmp_path: Path) -> None:
    figures = kill(tmp_path, "30", "1")
    assert sum(count for name, count in figures.items() if name.startswith("kills")) > 25


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_all_calls(tmp_path: Path) -> None:
    figures = kill(tmp_path)
    calls = figures["calls"] + figures["calls without hard links"]
    # How many calls there are depends a little on the timing of the writer's thread, more so on a busy machine.
    few = calls // 5
    assert figures["calls"] > 80
    assert figures["kills before a call"] + figures["kills after a call"] >= 2 * calls - few
    assert figures["kills in the middle of a write"] > 60
    assert figures.get("missed", 0) <= few
