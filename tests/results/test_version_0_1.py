"""An output that version 0.1 wrote can be read, resumed, retried and merged.

The directory `version_0_1` holds a manifest of 24 rows and its output in two shards. Shard 0 is complete, with three
rows that failed in the engine and one whose image is missing. The runner of shard 1 was killed after seven rows: it
left a part, a journal and a lock.
"""

import os
import shutil
import time
from pathlib import Path

import msgspec
import pytest

import batchvl
from batchvl.config.units import Shard
from batchvl.results import Counts, RetrySelection
from batchvl.results.lock import Holder
from batchvl.results.output import LocalStorage

from ..runner.running import run

RESUME = {"output": "out", "keep": ["site"]}


@pytest.fixture
def old_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the output, in the current directory, last written a day ago."""
    shutil.copytree(Path(__file__).with_name("version_0_1"), tmp_path, dirs_exist_ok=True)
    yesterday = time.time() - 86_400
    for path in tmp_path.rglob("*"):
        os.utime(path, (yesterday, yesterday))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def test_status(old_output: Path) -> None:
    status = batchvl.status(old_output)
    assert (status.rows, status.ok, status.failed, status.expected) == (19, 14, 5, 24)
    assert status.failures == {"engine_error": 3, "missing_file": 2}
    assert [shard.state for shard in status.shards] == ["complete", "stale"]
    assert status.shards[1].host == "node1"


def test_partial_merge(old_output: Path) -> None:
    report = batchvl.merge(old_output, partial=True, with_manifest="m.jsonl")
    assert (report.rows, report.missing, report.first_missing) == (19, 5, (19, 20, 21, 22, 23))
    assert report.counts == Counts(14, {"engine_error": 3, "missing_file": 2})


def test_resume_and_retry(old_output: Path) -> None:
    summary = run("m.jsonl", shard="1/2", **RESUME)
    assert (summary.rows, summary.resumed, summary.failures) == (12, 7, {"missing_file": 1})
    summaries = batchvl.retry(old_output, all=True, quiet=True, image_workers=1)
    assert [summary.failures for summary in summaries] == [{"missing_file": 1}] * 2
    report = batchvl.merge(old_output)
    assert (report.rows, report.missing, report.counts.failed) == (24, 0, {"missing_file": 2})
    assert batchvl.status(old_output).complete


def test_a_retry_selects_rows_by_the_codes_of_both_versions(old_output: Path) -> None:
    outcomes = LocalStorage(old_output).shard(Shard(0, 2)).recover().outcomes()
    failed = RetrySelection.of(["engine_error"]).failed(outcomes)
    assert {code: len(rows) for code, rows in failed.items()} == {"engine_error": 3}


def test_another_run_is_rejected(old_output: Path) -> None:
    with pytest.raises(batchvl.errors.ResumeError, match=r"--temperature: 0\.0 there, 0\.5 here"):
        run("m.jsonl", shard="1/2", temperature=0.5, **RESUME)


@pytest.mark.parametrize(("pid", "alive"), [("own", True), ("reused", False), ("elsewhere", None)])
def test_a_lock_names_a_process_in_the_same_way(old_output: Path, pid: str, alive: bool | None) -> None:
    """The lock's `start` is boot ID, PID namespace and clock ticks since boot, as version 0.1 wrote it."""
    lock = old_output / "shard-00001-of-00002" / "lock"
    holder = msgspec.json.decode(lock.read_bytes(), type=Holder)
    if pid != "elsewhere":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        holder.pid = os.getpid()
        holder.start = f"{boot} {os.readlink('/proc/self/ns/pid')} {ticks}{'0' if pid == 'reused' else ''}"
        lock.write_bytes(msgspec.json.encode(holder))
    current = LocalStorage(old_output).shard(Shard(1, 2)).holder()
    assert current is not None
    assert current.alive() is alive
