"""Scratch directories are removed at the end, and those of dead processes by the next one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from batchvl.storage.scratch import scratch_directory

HOLD = """
import sys, time
from pathlib import Path
from batchvl.storage.scratch import scratch_directory
with scratch_directory(Path(sys.argv[1]), ".merge-") as directory:
    (directory / "rows").write_bytes(b"rows")
    print(directory.name, flush=True)
    time.sleep(600)
"""


def test_the_directory_is_removed_at_the_end(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, ".merge-") as directory:
        (directory / "some").touch()
    with pytest.raises(FileNotFoundError), scratch_directory(tmp_path, ".merge-") as directory:
        (directory / "none").read_bytes()
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError), scratch_directory(tmp_path / "nowhere", ".merge-"):
        pass


def test_leftovers_of_a_killed_process_are_removed_and_directories_of_a_living_one_kept(tmp_path: Path) -> None:
    (tmp_path / ".merge-notes.txt").touch()  # not a scratch directory
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            with scratch_directory(tmp_path, ".merge-") as directory:
                assert {name, directory.name} == {path.name for path in tmp_path.iterdir() if path.is_dir()}
            assert (tmp_path / name / "rows").exists()
        finally:
            process.kill()
    assert (tmp_path / name / "rows").exists()
    with scratch_directory(tmp_path, ".merge-") as directory:
        assert {directory.name, ".merge-notes.txt"} == set(os.listdir(tmp_path))
    assert os.listdir(tmp_path) == [".merge-notes.txt"]
