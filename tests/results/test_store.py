import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchvl.config.units import Shard
from batchvl.errors import OptionError, ResumeError, StoppedEarly
from batchvl.results import Counts, ResultStore, merge, writer
from batchvl.storage.disk import Disk

from .samples import GUARD, failed, fill, names, only_folder, options, sample


async def until(true: "asyncio.Event | list[int]", seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not (true.is_set() if isinstance(true, asyncio.Event) else true):
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


async def test_a_run_and_what_the_next_one_finds(tmp_path: Path) -> None:
    told: list[Counts] = []
    rows = [failed(row) if row % 10 == 0 else sample(row) for row in range(95)]
    output = await fill(tmp_path, rows, replace(GUARD, total=100), part_rows=30, on_commit=told.append)
    assert (output.attempt, len(output.done), output.counts, output.complete) == (1, 0, Counts(), False)
    assert sum(counts.rows for counts in told) == 95
    assert sum(counts.failed.get("missing_file", 0) for counts in told) == 10
    assert names(tmp_path) == {"lock", "attempt-0001.json"} | {f"part-0001-00000{n}.parquet" for n in (1, 2, 3, 4)}

    output = await fill(tmp_path, [sample(row) for row in range(95, 100)], replace(GUARD, total=100), complete=True)
    assert (output.attempt, list(output.done), output.counts) == (2, [*range(95)], Counts(85, {"missing_file": 10}))
    assert "complete.json" in names(tmp_path)
    output = ResultStore.open(tmp_path, replace(GUARD, total=100))
    assert output.complete
    assert 99 in output.done
    await output.close()


async def test_parts_have_the_runs_metadata(tmp_path: Path) -> None:
    output = await fill(tmp_path, [sample(0)], metadata={"engine": '{"engine":"fake"}', "version": "1.2"})
    found = pq.read_metadata(output.directory / "part-0001-000001.parquet").metadata
    assert found[b"batchvl.engine"] == b'{"engine":"fake"}'
    assert found[b"batchvl.fingerprint"] == b"f00d"
    assert json.loads(found[b"batchvl.options"]) == {"model": "shapes"}
    attempt = json.loads((output.directory / "attempt-0001.json").read_bytes())
    assert (attempt["pid"], attempt["metadata"]["version"], attempt["retry"]) == (os.getpid(), "1.2", 0)


async def test_rows_count_only_once_they_are_synced(tmp_path: Path) -> None:
    class Slow(Disk):
        synced = 0

        def sync(self, fd: int) -> None:
            time.sleep(0.05)
            super().sync(fd)
            self.synced = os.fstat(fd).st_size

    disk, told = Slow(), []
    output = ResultStore.open(
        tmp_path, GUARD, options=options(), on_commit=lambda counts: told.append(disk.synced), disk=disk
    )
    before = disk.synced
    output.add(sample(0))
    await asyncio.sleep(0)
    assert told == []
    await until(told)
    assert told[0] > before
    await output.close()


async def test_no_part_before_the_run_has_described_itself(tmp_path: Path) -> None:
    told: list[Counts] = []
    output = ResultStore.open(tmp_path, GUARD, options=options(part_rows=10), on_commit=told.append)
    for row in range(35):
        output.add(sample(row))
    while sum(counts.rows for counts in told) < 35:
        await asyncio.sleep(0.005)
    assert {name for name in names(tmp_path) if "part" in name} == set()
    output.describe({"engine": "fake"})
    while "part-0001-000003.parquet" not in names(tmp_path):
        await asyncio.sleep(0.005)
    assert "journal-0001-000004.log" in names(tmp_path)
    await output.close()
    assert pq.read_metadata(output.directory / "part-0001-000001.parquet").metadata[b"batchvl.engine"] == b"fake"


async def test_a_run_that_ends_undescribed_keeps_its_rows(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD)
    output.add(failed(0))
    await output.close()
    assert merge(tmp_path, partial=True).counts == Counts(0, {"missing_file": 1})


async def test_an_attempt_without_rows_leaves_no_journal(tmp_path: Path) -> None:
    await fill(tmp_path, [])
    assert names(tmp_path) == {"lock", "attempt-0001.json"}


async def test_whoever_is_too_fast_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BACKLOG_BYTES", 100_000)
    most = 0
    output = ResultStore.open(tmp_path, GUARD, options=options())
    for row in range(300):
        await output.wait_for_capacity()
        output.add(sample(row, response="x" * 10_000))
        most = max(most, output._writer._uncommitted)
    await output.close()
    assert most < 130_000
    assert merge(tmp_path, partial=True).rows == 300


async def test_parts_are_rolled_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", 50_000)
    monkeypatch.setattr(writer, "COMMIT_BYTES", 10_000)
    told = Counts()
    output = ResultStore.open(tmp_path, GUARD, options=options(), on_commit=told.add)
    output.describe({})
    for row in range(20):
        output.add(sample(row, response="x" * 10_000))
        while told.rows <= row:
            await asyncio.sleep(0.001)
    await output.close()
    assert [name for name in sorted(names(tmp_path)) if name.startswith("part")] == [
        f"part-0001-00000{number}.parquet" for number in (1, 2, 3, 4)
    ]


def test_a_folder_in_use_is_refused_and_free_again_after_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from batchvl.results import ResultStore, RunFile\n"
        "ResultStore.open(Path(sys.argv[1]), RunFile('f00d', {'model': 'shapes'}))\n"
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        told = rf"in use by another runner \(host .*, process {process.pid}, since"
        with pytest.raises(ResumeError, match=told):
            ResultStore.open(tmp_path, GUARD)
        process.kill()
    output = ResultStore.open(tmp_path, GUARD)
    assert output.attempt == 2
    with pytest.raises(ResumeError, match="in use by another runner"):
        ResultStore.open(tmp_path, GUARD)
    asyncio.run(output.close())
    asyncio.run(ResultStore.open(tmp_path, GUARD).close())


async def test_shards_do_not_exclude_each_other(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=2, total=10)
    outputs = [ResultStore.open(tmp_path, guard, Shard(index, 2)) for index in range(2)]
    for row in range(10):
        outputs[row // 5].add(sample(row))
    for output in outputs:
        await output.close(complete=True)
    assert (merge(tmp_path).rows, merge(tmp_path).missing) == (10, 0)


async def test_a_part_and_its_journal_are_not_counted_twice(tmp_path: Path) -> None:
    class Killed(Disk):
        def remove(self, path: Path) -> None:
            if path.name.startswith("journal"):
                raise OSError(5, "as if killed between rename and remove")
            super().remove(path)

    with pytest.raises(StoppedEarly):
        await fill(tmp_path, [sample(row) for row in range(10)], disk=Killed())
    assert {"journal-0001-000001.log", "part-0001-000001.parquet"} <= names(tmp_path)
    output = await fill(tmp_path, [sample(10)])
    assert output.counts == Counts(10)
    assert merge(tmp_path, partial=True).rows == 11
    assert "journal-0001-000001.log" in names(tmp_path)  # of another attempt: only read


async def test_attempts_that_do_not_see_each_other(tmp_path: Path) -> None:
    """Two hosts on a file system without locks: all files are of different names, and each row is there once."""
    first = ResultStore.open(tmp_path, GUARD)
    (first.directory / "lock").unlink()
    second = ResultStore.open(tmp_path, GUARD)
    assert (first.attempt, second.attempt) == (1, 2)
    for row in range(10):
        (second if row == 3 else first).add(failed(row))
        second.add(sample(row))
    first.describe({"engine": "a"})
    second.describe({"engine": "b"})
    await asyncio.gather(first.close(), second.close())
    assert merge(tmp_path, partial=True).counts == Counts(10)
    third = ResultStore.open(tmp_path, GUARD)
    assert (third.attempt, third.counts) == (3, Counts(10))
    await third.close()


async def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"-o .*file.*: cannot be written: "):
        ResultStore.open(tmp_path / "file" / "out", GUARD)


async def test_a_folder_deleted_under_the_run(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path / "out", GUARD, options=options())
    output.add(sample(0))
    await asyncio.sleep(0.2)
    shutil.rmtree(tmp_path / "out")
    output.add(sample(1))
    with pytest.raises(StoppedEarly, match="deleted"):
        await output.close()


async def test_an_error_of_our_own_is_not_hidden(tmp_path: Path) -> None:
    def broken(self: object, *_: object) -> None:
        raise ZeroDivisionError

    disk = Disk()
    disk.sync_directory = broken.__get__(disk)  # type: ignore[method-assign]
    output = ResultStore.open(tmp_path, GUARD)
    output._writer._disk = disk
    output.add(sample(0))
    with pytest.raises(ZeroDivisionError):
        await output.close()
    await ResultStore.open(tmp_path, GUARD).close()
    assert only_folder(tmp_path).last_attempt() == 2
