"""Disks that fill up, fail or disappear during a run: exit code 75 with the reason, and the same command resumes."""

import errno
import itertools
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchvl.errors import StoppedEarly
from batchvl.results import Counts, ResultStore, merge

from ..results.samples import RUN_FILE, options, sample
from ..results.samples import fill as fill_output
from ..runner.running import wait_until
from .disks import Failing, Seam
from .ledger import Ledger
from .life import Life
from .mounts import Mounts, fill, tmpfs
from .work import SCHEMA, Work

ERRORS = {"ENOSPC": "No space left on device", "EDQUOT": "Disk quota exceeded", "EIO": "Input/output error"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"), 120)


def wait_for_end(life: Life) -> int:
    """Wait for all processes of the run and return its exit code."""
    try:
        code = life.wait()
        life.wait_for_processes()
    finally:
        life.kill_all()
    assert "Traceback" not in life.output, life.output
    return code


class Trial:
    """Consecutive runs in one output directory, each on a given disk."""

    def __init__(self, work: Work, scratch: Path) -> None:
        self.work, self.scratch, self.out = work, scratch, scratch / "out"
        self.ledger = Ledger(self.out, SCHEMA)

    def calls(self) -> int:
        """Return the number of calls to the disk of an undisturbed run."""
        output = self.run()[1]
        self.start_over()
        return int(output.rpartition("calls ")[2])

    def start_over(self) -> None:
        """Remove the output directory."""
        shutil.rmtree(self.out)
        self.ledger = Ledger(self.out, SCHEMA)

    def run(self, disk: dict[str, Any] | None = None) -> tuple[int, str, int]:
        """Run, and return the exit code, the output and the number of rows reported as committed."""
        options = json.dumps(self.work.options(self.out))
        line = [sys.executable, "-m", "tests.crash.victim", json.dumps(disk or {}), str(self.work.manifest), options]
        life = Life(line, self.scratch / "log")
        code = wait_for_end(life)
        assert "never retrieved" not in life.output, life.output
        committed = max((int(line) for line in life.output.splitlines() if line.isdigit()), default=0)
        return code, life.output, committed

    def check_committed(self, committed: int) -> None:
        """Check that at least this many rows are there, and require them from now on."""
        if (self.out / "run.json").exists():
            assert self.ledger.expect() >= committed
            self.ledger.check(self.scratch)
        else:
            assert not committed

    def check_resume(self) -> None:
        """Check that the same command finishes the run and that nothing is lost."""
        code, output, _ = self.run()
        assert code == 0, output
        self.ledger.check(self.scratch)
        self.work.check(self.out / "results.parquet")


def suffer(trial: Trial, calls: int, draw: random.Random) -> int:
    """Run on a disk that fails once or for good, then resume on a good disk; return the first run's exit code."""
    name = draw.choice(list(ERRORS))
    disk = {"fail": draw.randint(1, calls), "code": name, "once": draw.random() < 0.5}
    code, output, committed = trial.run(disk)
    if code == 75:
        assert f"{ERRORS[name]} ({name})" in output
        assert "run the same command again to resume" in output
    else:  # the failed call removed a temporary file, which is harmless, or there were fewer calls
        assert code == 0, output
        trial.work.check(trial.out / "results.parquet")
        assert b"batchvl.engine" in pq.read_metadata(trial.out / "results.parquet").metadata
    trial.check_committed(committed)
    trial.check_resume()
    trial.start_over()
    return code


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_a_result_store_whose_disk_fails_at_any_call(code: int, once: bool, tmp_path: Path) -> None:
    """Committed rows are there afterwards. A failure to remove a temporary file may be ignored."""
    records, failures = [sample(row) for row in range(15)], []
    for at in itertools.count(1):
        out, committed, disk = tmp_path / str(at), Counts(), Failing(at, code, once=once)
        try:
            await fill_output(out, records, part_rows=10, on_commit=committed.add, disk=disk)
        except StoppedEarly as error:
            failures.append(str(error))
        output = ResultStore.open(out, RUN_FILE, options=options(), disk=Seam())
        assert set(range(committed.rows)) <= set(output.done)
        output.describe({})
        for row in set(range(15)) - set(output.done):
            output.add(sample(row))
        await output.close()
        assert merge(out, partial=True, disk=Seam()).rows == 15, at
        table = pq.read_table(out / "results.parquet")
        assert table["response"].to_pylist() == [record.response for record in records], at
        if len(disk.names) < at:
            break
    assert at > 40, "the failures went through journal, part and rename"
    assert len(failures) > 30
    assert all(f"({errno.errorcode[code]})" in failure for failure in failures)


def test_a_run_whose_metadata_cannot_be_written(work: Work, tmp_path: Path) -> None:
    """Only that write fails. If it were ignored, the parts would not say which engine answered the rows."""
    trial = Trial(work, tmp_path)
    code, output, committed = trial.run({"fail": 21, "code": "EIO", "once": True})
    assert code == 75, output
    trial.check_committed(committed)
    [attempt] = trial.out.glob("shard-*/attempt-*.json")
    assert "metadata" not in json.loads(attempt.read_bytes()), "the write of the metadata failed"
    trial.check_resume()


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_a_disk_that_fails_at_many_calls(work: Work, tmp_path: Path) -> None:
    trial, draw = Trial(work, tmp_path), random.Random(4)
    calls = trial.calls()
    codes = [suffer(trial, calls, draw) for _ in range(25)]
    assert codes.count(75) > 15


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_a_run_killed_at_some_call(work: Work, tmp_path: Path) -> None:
    trial, draw = Trial(work, tmp_path), random.Random(5)
    calls = trial.calls()
    for _ in range(20):
        disk = {"kill": draw.randint(1, calls), "when": draw.choice(["before", "after", "middle"])}
        code, _, committed = trial.run(disk)
        assert code in (-9, 0)
        trial.check_committed(committed)
        trial.check_resume()
        trial.start_over()


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_no_file_can_be_created_any_more(work: Work, tmp_path: Path) -> None:
    """Including logs, the lock and the summary, which bypass `Disk`."""
    trial = Trial(work, tmp_path)
    for at in range(1, 21):
        code = ("ENOSPC", "EIO")[at % 2]
        exit_code, output, committed = trial.run({"names": at, "code": code})
        assert exit_code == 75, (at, output)
        assert f"{ERRORS[code]} ({code})" in output, (at, output)
        trial.check_committed(committed)
        trial.check_resume()
        trial.start_over()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, Mounts]]:
    with tmpfs(tmp_path / "small", "1500k") as namespace:
        yield tmp_path / "small", namespace


def started(work: Work, small: tuple[Path, Mounts], log: Path, out: str = "out") -> Life:
    at, namespace = small
    return Life([*namespace.enter, *work.command(at / out)], log)


def journalled(out: Path) -> bool:
    return any(path.stat().st_size > 20 for path in out.glob("shard-*/journal-*"))


def test_a_disk_that_fills_up(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    directory = small[1].from_outside(small[0])
    ledger = Ledger(directory / "out", SCHEMA)
    life = started(work, small, tmp_path / "log")
    wait_until(lambda: journalled(directory / "out") or life.ended)
    ballast = fill(directory)
    assert wait_for_end(life) == 75, life.output
    assert "No space left on device (ENOSPC)" in life.output
    assert "Free some space, then run the same command again to resume" in life.output
    ledger.expect()

    again = started(work, small, tmp_path / "log")  # while the disk is still full
    assert wait_for_end(again) == 75, again.output
    assert "No space left on device (ENOSPC)" in again.output

    ballast.unlink()
    last = started(work, small, tmp_path / "log")
    assert wait_for_end(last) == 0, last.output
    ledger.check(tmp_path)
    work.check(directory / "out" / "results.parquet")


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_a_disk_that_fills_up_at_any_moment(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    directory, draw, full = small[1].from_outside(small[0]), random.Random(6), 0
    for number in range(8):
        out = directory / f"out-{number}"
        ledger, rows = Ledger(out, SCHEMA), draw.randrange(work.rows)
        life = started(work, small, tmp_path / "log", out.name)
        wait_until(lambda life=life, ledger=ledger, rows=rows: len(ledger.rows()) >= rows or life.ended)
        ballast = fill(directory)
        code = wait_for_end(life)
        assert code in (0, 75), life.output
        full += code == 75
        ledger.expect()
        ballast.unlink()
        last = started(work, small, tmp_path / "log", out.name)
        assert wait_for_end(last) == 0, last.output
        ledger.check(tmp_path)
        work.check(out / "results.parquet")
        shutil.rmtree(out)
    assert full > 3


def test_a_read_only_output(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    small[1].run("mount", "-o", "remount,ro", small[0])
    life = started(work, small, tmp_path / "log")
    assert wait_for_end(life) == 2
    assert "cannot be written: Read-only file system" in life.output


@pytest.mark.crash
def test_an_output_that_becomes_read_only(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    """During the run, as the kernel does with a failing disk."""
    at, namespace = small
    directory = namespace.from_outside(at)
    life = started(work, small, tmp_path / "log")
    wait_until(lambda: journalled(directory / "out") or life.ended)
    # The tmpfs cannot be remounted while files are open for writing; a bind mount over the directory can.
    for command in (("mount", "--bind", at / "out", at / "out"), ("mount", "-o", "remount,bind,ro", at / "out")):
        namespace.run(*command)
    assert wait_for_end(life) == 75, life.output
    assert "Read-only file system (EROFS)" in life.output

    again = started(work, small, tmp_path / "log")
    assert wait_for_end(again) == 75, again.output
    assert "cannot be written: Read-only file system" in again.output

    namespace.run("umount", at / "out")
    last = started(work, small, tmp_path / "log")
    assert wait_for_end(last) == 0, last.output
    work.check(directory / "out" / "results.parquet")


@pytest.mark.crash
@pytest.mark.parametrize("way", ["deleted", "renamed"])
def test_an_output_directory_that_disappears(way: str, work: Work, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    ledger = Ledger(elsewhere, SCHEMA)
    life = Life(work.command(out), tmp_path / "log")
    wait_until(lambda: journalled(out) or life.ended)
    if way == "deleted":
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)  # the run creates files meanwhile
    else:
        out.rename(elsewhere)
    assert wait_for_end(life) == 75, life.output
    assert "run the same command again to resume" in life.output
    if way == "renamed":
        assert ledger.expect() > 0
        shutil.rmtree(out, ignore_errors=True)
        elsewhere.rename(out)
        ledger.out = out
    last = Life(work.command(out), tmp_path / "log")
    assert wait_for_end(last) == 0, last.output
    work.check(out / "results.parquet")
    if way == "renamed":
        ledger.check(tmp_path)


@pytest.mark.crash
def test_a_merge_onto_a_full_disk_keeps_the_old_file(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    directory = small[1].from_outside(small[0])
    assert wait_for_end(started(work, small, tmp_path / "log")) == 0
    before = (directory / "out" / "results.parquet").read_bytes()
    fill(directory)
    with pytest.raises(StoppedEarly, match="No space left on device"):
        merge(directory / "out")
    assert (directory / "out" / "results.parquet").read_bytes() == before
    assert {path.name for path in (directory / "out").iterdir() if path.name.startswith(".")} == set()
