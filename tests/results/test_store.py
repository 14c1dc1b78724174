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

from .samples import RUN_FILE, failed, fill, names, only_shard, options, sample


async def test_the_next_attempt_finds_the_rows_of_the_first(tmp_path: Path) -> None:
    commits: list[Counts] = []
    rows = [failed(row) if row % 10 == 0 else sample(row) for row in range(95)]
    results = await fill(tmp_path, rows, replace(RUN_FILE, total=100), part_rows=30, on_commit=commits.append)
    assert (results.attempt, len(results.done), results.counts, results.complete) == (1, 0, Counts(), False)
    assert sum(counts.rows for counts in commits) == 95
    assert sum(counts.failed.get("missing_file", 0) for counts in commits) == 10
    assert names(tmp_path) == {"lock", "attempt-0001.json"} | {f"part-0001-00000{n}.parquet" for n in (1, 2, 3, 4)}

    results = await fill(tmp_path, [sample(row) for row in range(95, 100)], replace(RUN_FILE, total=100), complete=True)
    assert (results.attempt, list(results.done), results.counts) == (2, [*range(95)], Counts(85, {"missing_file": 10}))
    assert "complete.json" in names(tmp_path)
    results = ResultStore.open(tmp_path, replace(RUN_FILE, total=100))
    assert results.complete
    assert 99 in results.done
    await results.close()


async def test_parts_have_the_metadata_of_the_run(tmp_path: Path) -> None:
    results = await fill(tmp_path, [sample(0)], metadata={"engine": '{"engine":"fake"}', "version": "1.2"})
    metadata = pq.read_metadata(results.directory / "part-0001-000001.parquet").metadata
    assert metadata[b"batchvl.engine"] == b'{"engine":"fake"}'
    assert metadata[b"batchvl.fingerprint"] == b"f00d"
    assert json.loads(metadata[b"batchvl.options"]) == {"model": "shapes"}
    attempt = json.loads((results.directory / "attempt-0001.json").read_bytes())
    assert (attempt["pid"], attempt["metadata"]["version"], attempt["retry"]) == (os.getpid(), "1.2", 0)


async def test_rows_are_reported_once_they_are_synced(tmp_path: Path) -> None:
    class Slow(Disk):
        synced = 0

        def sync(self, fd: int) -> None:
            time.sleep(0.05)
            super().sync(fd)
            self.synced = os.fstat(fd).st_size

    disk = Slow()
    committed: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    results = ResultStore.open(
        tmp_path, RUN_FILE, options=options(), on_commit=lambda counts: committed.set_result(disk.synced), disk=disk
    )
    before = disk.synced
    results.add(sample(0))
    await asyncio.sleep(0)
    assert not committed.done()
    assert await committed > before
    await results.close()


async def test_no_part_is_made_before_the_metadata_is_known(tmp_path: Path) -> None:
    committed = Counts()
    results = ResultStore.open(tmp_path, RUN_FILE, options=options(part_rows=10), on_commit=committed.add)
    for row in range(35):
        results.add(sample(row))
    while committed.rows < 35:
        await asyncio.sleep(0.005)
    assert {name for name in names(tmp_path) if "part" in name} == set()
    results.describe({"engine": "fake"})
    while "part-0001-000003.parquet" not in names(tmp_path):
        await asyncio.sleep(0.005)
    assert "journal-0001-000004.log" in names(tmp_path)
    await results.close()
    assert pq.read_metadata(results.directory / "part-0001-000001.parquet").metadata[b"batchvl.engine"] == b"fake"


async def test_a_run_without_metadata_keeps_its_rows(tmp_path: Path) -> None:
    results = ResultStore.open(tmp_path, RUN_FILE)
    results.add(failed(0))
    await results.close()
    assert merge(tmp_path, partial=True).counts == Counts(0, {"missing_file": 1})


async def test_an_attempt_without_rows_leaves_no_journal(tmp_path: Path) -> None:
    await fill(tmp_path, [])
    assert names(tmp_path) == {"lock", "attempt-0001.json"}


async def test_the_backlog_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "BACKLOG_BYTES", 100_000)
    committed, backlog = Counts(), 0
    results = ResultStore.open(tmp_path, RUN_FILE, options=options(), on_commit=committed.add)
    for row in range(300):
        await results.wait_for_capacity()
        results.add(sample(row, response="x" * 10_000))
        backlog = max(backlog, row + 1 - committed.rows)
    await results.close()
    assert 1 < backlog < 13, "of at least 10,000 bytes each"
    assert merge(tmp_path, partial=True).rows == 300


async def test_segments_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "PART_BYTES", 50_000)
    monkeypatch.setattr(writer, "COMMIT_BYTES", 10_000)
    committed = Counts()
    results = ResultStore.open(tmp_path, RUN_FILE, options=options(), on_commit=committed.add)
    results.describe({})
    for row in range(20):
        results.add(sample(row, response="x" * 10_000))
        while committed.rows <= row:
            await asyncio.sleep(0.001)
    await results.close()
    assert [name for name in sorted(names(tmp_path)) if name.startswith("part")] == [
        f"part-0001-00000{number}.parquet" for number in (1, 2, 3, 4)
    ]


def test_a_directory_in_use_is_rejected_until_its_runner_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from batchvl.results import ResultStore, RunFile\n"
        "ResultStore.open(Path(sys.argv[1]), RunFile('f00d', {'model': 'shapes'}))\n"
        "print('open', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        message = rf"in use by another runner \(host .*, process {process.pid}, since"
        with pytest.raises(ResumeError, match=message):
            ResultStore.open(tmp_path, RUN_FILE)
        process.kill()
    results = ResultStore.open(tmp_path, RUN_FILE)
    assert results.attempt == 2
    with pytest.raises(ResumeError, match="in use by another runner"):
        ResultStore.open(tmp_path, RUN_FILE)
    asyncio.run(results.close())
    asyncio.run(ResultStore.open(tmp_path, RUN_FILE).close())


async def test_shards_do_not_exclude_each_other(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=2, total=10)
    stores = [ResultStore.open(tmp_path, run_file, Shard(index, 2)) for index in range(2)]
    for row in range(10):
        stores[row // 5].add(sample(row))
    for results in stores:
        await results.close(complete=True)
    assert (merge(tmp_path).rows, merge(tmp_path).missing) == (10, 0)


async def test_a_part_and_its_journal_are_not_counted_twice(tmp_path: Path) -> None:
    class Killed(Disk):
        def remove(self, path: Path) -> None:
            if path.name.startswith("journal"):
                raise OSError(5, "simulates a kill between rename and remove")
            super().remove(path)

    with pytest.raises(StoppedEarly):
        await fill(tmp_path, [sample(row) for row in range(10)], disk=Killed())
    assert {"journal-0001-000001.log", "part-0001-000001.parquet"} <= names(tmp_path)
    results = await fill(tmp_path, [sample(10)])
    assert results.counts == Counts(10)
    assert merge(tmp_path, partial=True).rows == 11
    assert "journal-0001-000001.log" in names(tmp_path)  # belongs to another attempt: only read


async def test_attempts_that_do_not_see_each_other(tmp_path: Path) -> None:
    """Two hosts on a file system without locks: no two files have the same name, and each row appears once."""
    first = ResultStore.open(tmp_path, RUN_FILE)
    (first.directory / "lock").unlink()
    second = ResultStore.open(tmp_path, RUN_FILE)
    assert (first.attempt, second.attempt) == (1, 2)
    for row in range(10):
        (second if row == 3 else first).add(failed(row))
        second.add(sample(row))
    first.describe({"engine": "a"})
    second.describe({"engine": "b"})
    await asyncio.gather(first.close(), second.close())
    assert merge(tmp_path, partial=True).counts == Counts(10)
    third = ResultStore.open(tmp_path, RUN_FILE)
    assert (third.attempt, third.counts) == (3, Counts(10))
    await third.close()


async def test_a_directory_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"-o .*file.*: cannot be written: "):
        ResultStore.open(tmp_path / "file" / "out", RUN_FILE)


async def test_a_directory_that_is_deleted_during_the_run(tmp_path: Path) -> None:
    results = ResultStore.open(tmp_path / "out", RUN_FILE, options=options())
    results.add(sample(0))
    await asyncio.sleep(0.2)
    shutil.rmtree(tmp_path / "out")
    results.add(sample(1))
    with pytest.raises(StoppedEarly, match="deleted"):
        await results.close()


async def test_an_internal_error_is_not_hidden(tmp_path: Path) -> None:
    class Buggy(Disk):
        broken = False

        def sync_directory(self, path: Path) -> None:
            if self.broken:
                raise ZeroDivisionError
            super().sync_directory(path)

    disk = Buggy()
    results = ResultStore.open(tmp_path, RUN_FILE, disk=disk)
    disk.broken = True
    results.add(sample(0))
    with pytest.raises(ZeroDivisionError):
        await results.close()
    await ResultStore.open(tmp_path, RUN_FILE).close()
    assert only_shard(tmp_path).last_attempt() == 2
