"""Temporary folders: gone at the end, and those of dead processes with the next one."""

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
with scratch_directory(Path(sys.argv[1]), ".merge-") as folder:
    (folder / "rows").write_bytes(b"rows")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def test_it_is_gone_at_the_end(tmp_path: Path) -> None:
    with scratch_directory(tmp_path, ".merge-") as folder:
        (folder / "some").touch()
    with pytest.raises(FileNotFoundError), scratch_directory(tmp_path, ".merge-") as folder:
        (folder / "none").read_bytes()
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError), scratch_directory(tmp_path / "nowhere", ".merge-"):
        pass


def test_what_a_killed_process_left_goes_and_what_a_living_one_has_stays(tmp_path: Path) -> None:
    (tmp_path / ".merge-notes.txt").touch()  # somebody else's
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            with scratch_directory(tmp_path, ".merge-") as folder:
                assert {name, folder.name} == {path.name for path in tmp_path.iterdir() if path.is_dir()}
            assert (tmp_path / name / "rows").exists()
        finally:
            process.kill()
    assert (tmp_path / name / "rows").exists()
    with scratch_directory(tmp_path, ".merge-") as folder:
        assert {folder.name, ".merge-notes.txt"} == set(os.listdir(tmp_path))
    assert os.listdir(tmp_path) == [".merge-notes.txt"]
