"""Disks that fill up, fail, or go away under a run: exit code 75 and why, and the same command goes on."""

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

from ..results.samples import GUARD, options, sample
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


def ended(life: Life) -> int:
    try:
        code = life.wait()
        life.wait_for_the_last()
    finally:
        life.put_an_end()
    assert "Traceback" not in life.said, life.said
    return code


class Trial:
    """Runs one after the other in an output folder, each on a disk as told."""

    def __init__(self, work: Work, scratch: Path) -> None:
        self.work, self.scratch, self.out = work, scratch, scratch / "out"
        self.ledger = Ledger(self.out, SCHEMA)

    def calls(self) -> int:
        """How many calls of the disk a run makes that nothing disturbs."""
        said = self.run()[1]
        self.start_over()
        return int(said.rpartition("calls ")[2])

    def start_over(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.out)
        self.ledger = Ledger(self.out, SCHEMA)

    def run(self, disk: dict[str, Any] | None = None) -> tuple[int, str, int]:
        """Its exit code, what it said, and how many rows it told were committed."""
        options = json.dumps(self.work.options(self.out))
        line = [sys.executable, "-m", "tests.crash.victim", json.dumps(disk or {}), str(self.work.manifest), options]
        life = Life(line, self.scratch / "log")
        code = ended(life)
        assert "never retrieved" not in life.said, life.said
        told = max((int(line) for line in life.said.splitlines() if line.isdigit()), default=0)
        return code, life.said, told

    def committed(self, told: int) -> None:
        """So many rows are there, and are to stay."""
        if (self.out / "run.json").exists():
            assert self.ledger.expect() >= told
            self.ledger.check(self.scratch)
        else:
            assert not told

    def goes_on(self) -> None:
        """The same again comes to its end, and nothing is lost."""
        code, said, _ = self.run()
        assert code == 0, said
        self.ledger.check(self.scratch)
        self.work.check(self.out / "results.parquet")


def suffer(trial: Trial, calls: int, draw: random.Random) -> int:
    """A run whose disk fails from a call on, or at one alone, and then one on a good one; the first one's exit code."""
    name = draw.choice(list(ERRORS))
    disk = {"fail": draw.randint(1, calls), "code": name, "once": draw.random() < 0.5}
    code, said, told = trial.run(disk)
    if code == 75:
        assert f"{ERRORS[name]} ({name})" in said
        assert "run the same command again to go on" in said
    else:  # what failed was the removal of a temporary file, which harms nobody, or there were fewer calls
        assert code == 0, said
        trial.work.check(trial.out / "results.parquet")
        assert b"batchvl.engine" in pq.read_metadata(trial.out / "results.parquet").metadata
    trial.committed(told)
    trial.goes_on()
    trial.start_over()
    return code


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
async def test_an_output_whose_disk_fails_at_any_call(code: int, once: bool, tmp_path: Path) -> None:
    """What was told of is there afterwards. Removing a temporary file may fail and be nobody's business."""
    records, failures = [sample(row) for row in range(15)], []
    for at in itertools.count(1):
        out, told, disk = tmp_path / str(at), Counts(), Failing(at, code, once=once)
        try:
            await fill_output(out, records, part_rows=10, on_commit=told.add, disk=disk)
        except StoppedEarly as error:
            failures.append(str(error))
        output = ResultStore.open(out, GUARD, options=options(), disk=Seam())
        assert set(range(told.rows)) <= set(output.done)
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


def test_what_the_run_says_about_itself_cannot_be_written(work: Work, tmp_path: Path) -> None:
    """At that moment alone: rows would all be there, in parts that do not tell which engine answered them."""
    trial = Trial(work, tmp_path)
    code, said, told = trial.run({"fail": 21, "code": "EIO", "once": True})
    assert code == 75, said
    trial.committed(told)
    [attempt] = trial.out.glob("shard-*/attempt-*.json")
    assert "metadata" not in json.loads(attempt.read_bytes()), "it was the writing of these that failed"
    trial.goes_on()


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
        code, _, told = trial.run(disk)
        assert code in (-9, 0)
        trial.committed(told)
        trial.goes_on()
        trial.start_over()


@pytest.mark.crash
@pytest.mark.timeout(900)
def test_no_name_can_be_made_any_more(work: Work, tmp_path: Path) -> None:
    """From one on, whoever makes it: logs, the lock and the summary, which do not go through `Disk`, as well."""
    trial = Trial(work, tmp_path)
    for at in range(1, 21):
        code = ("ENOSPC", "EIO")[at % 2]
        ended, said, told = trial.run({"names": at, "code": code})
        assert ended == 75, (at, said)
        assert f"{ERRORS[code]} ({code})" in said, (at, said)
        trial.committed(told)
        trial.goes_on()
        trial.start_over()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, Mounts]]:
    with tmpfs(tmp_path / "small", "1500k") as found:
        yield tmp_path / "small", found


def started(work: Work, small: tuple[Path, Mounts], log: Path, out: str = "out") -> Life:
    at, found = small
    return Life([*found.enter, *work.command(at / out)], log)


def journalled(out: Path) -> bool:
    return any(path.stat().st_size > 20 for path in out.glob("shard-*/journal-*"))


def test_a_disk_that_somebody_fills(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    folder = small[1].seen(small[0])
    ledger = Ledger(folder / "out", SCHEMA)
    life = started(work, small, tmp_path / "log")
    wait_until(lambda: journalled(folder / "out") or life.ended)
    ballast = fill(folder)
    assert ended(life) == 75, life.said
    assert "No space left on device (ENOSPC)" in life.said
    assert "free some space and run the same command again to go on" in life.said
    ledger.expect()

    again = started(work, small, tmp_path / "log")  # while it is full still
    assert ended(again) == 75, again.said
    assert "No space left on device (ENOSPC)" in again.said

    ballast.unlink()
    last = started(work, small, tmp_path / "log")
    assert ended(last) == 0, last.said
    ledger.check(tmp_path)
    work.check(folder / "out" / "results.parquet")


@pytest.mark.crash
@pytest.mark.timeout(600)
def test_a_disk_that_is_filled_at_any_moment(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    folder, draw, full = small[1].seen(small[0]), random.Random(6), 0
    for number in range(8):
        out = folder / f"out-{number}"
        ledger, rows = Ledger(out, SCHEMA), draw.randrange(work.rows)
        life = started(work, small, tmp_path / "log", out.name)
        wait_until(lambda life=life, ledger=ledger, rows=rows: len(ledger.rows()) >= rows or life.ended)
        ballast = fill(folder)
        code = ended(life)
        assert code in (0, 75), life.said
        full += code == 75
        ledger.expect()
        ballast.unlink()
        last = started(work, small, tmp_path / "log", out.name)
        assert ended(last) == 0, last.said
        ledger.check(tmp_path)
        work.check(out / "results.parquet")
        shutil.rmtree(out)
    assert full > 3


def test_an_output_that_is_read_only(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    small[1].run("mount", "-o", "remount,ro", small[0])
    life = started(work, small, tmp_path / "log")
    assert ended(life) == 2
    assert "cannot be written: Read-only file system" in life.said


@pytest.mark.crash
def test_an_output_that_becomes_read_only(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    """Under the run: as a kernel does it with a disk that fails."""
    at, found = small
    folder = found.seen(at)
    life = started(work, small, tmp_path / "log")
    wait_until(lambda: journalled(folder / "out") or life.ended)
    # The tmpfs itself cannot be remounted while files are open for writing; a mount over the folder can be read-only.
    for command in (("mount", "--bind", at / "out", at / "out"), ("mount", "-o", "remount,bind,ro", at / "out")):
        found.run(*command)
    assert ended(life) == 75, life.said
    assert "Read-only file system (EROFS)" in life.said

    again = started(work, small, tmp_path / "log")
    assert ended(again) == 75, again.said
    assert "cannot be written: Read-only file system" in again.said

    found.run("umount", at / "out")
    last = started(work, small, tmp_path / "log")
    assert ended(last) == 0, last.said
    work.check(folder / "out" / "results.parquet")


@pytest.mark.crash
@pytest.mark.parametrize("way", ["deleted", "renamed"])
def test_an_output_folder_that_goes_away(way: str, work: Work, tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    ledger = Ledger(elsewhere, SCHEMA)
    life = Life(work.command(out), tmp_path / "log")
    wait_until(lambda: journalled(out) or life.ended)
    if way == "deleted":
        while out.exists():
            shutil.rmtree(out, ignore_errors=True)  # some files come while others go
    else:
        out.rename(elsewhere)
    assert ended(life) == 75, life.said
    assert "run the same command again to go on" in life.said
    if way == "renamed":
        assert ledger.expect() > 0
        shutil.rmtree(out, ignore_errors=True)
        elsewhere.rename(out)
        ledger.out = out
    last = Life(work.command(out), tmp_path / "log")
    assert ended(last) == 0, last.said
    work.check(out / "results.parquet")
    if way == "renamed":
        ledger.check(tmp_path)


@pytest.mark.crash
def test_a_merge_onto_a_full_disk_leaves_the_older_file(work: Work, small: tuple[Path, Mounts], tmp_path: Path) -> None:
    folder = small[1].seen(small[0])
    assert ended(started(work, small, tmp_path / "log")) == 0
    before = (folder / "out" / "results.parquet").read_bytes()
    fill(folder)
    with pytest.raises(StoppedEarly, match="No space left on device"):
        merge(folder / "out")
    assert (folder / "out" / "results.parquet").read_bytes() == before
    assert {path.name for path in (folder / "out").iterdir() if path.name.startswith(".")} == set()
