"""`status` and `watch` on outputs in every state."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest

import batchvl
from batchvl.config.units import Shard
from batchvl.errors import ResumeError
from batchvl.results import Record, ResultStore, watch
from batchvl.results.lock import Holder
from batchvl.results.poller import ShardPoller
from batchvl.results.shard import SegmentKey, ShardDirectory
from batchvl.results.status import QUIET_SECONDS, ShardStatus, Status
from batchvl.results.watch import STALE_SECONDS

from .samples import RUN_FILE, failed, fill, only_shard, options, sample

FOUR = replace(RUN_FILE, shards=4, total=42)  # of 10, 11, 10 and 11 rows


def states(status: Status) -> list[str]:
    return [shard.state for shard in status.shards]


def rows_of(index: int) -> list[Record]:
    return [sample(row) for row in Shard(index, 4).rows(42)]


def age(directory: Path, seconds: float) -> None:
    """Make all files in the directory older by this time."""
    for path in directory.iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def change_holder(lock: Path, **changed: str | int) -> None:
    holder = msgspec.json.decode(lock.read_bytes(), type=Holder)
    lock.write_bytes(msgspec.json.encode(msgspec.structs.replace(holder, **changed)))


async def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_status_of_all_shards_and_each(tmp_path: Path) -> None:
    await fill(tmp_path, rows_of(0), FOUR, shard=Shard(0, 4), complete=True)
    await fill(tmp_path, [failed(10, "http_status"), failed(11), sample(12)], FOUR, shard=Shard(1, 4))
    await fill(tmp_path, [failed(13), sample(14)], FOUR, shard=Shard(1, 4))
    await fill(tmp_path, [failed(21)], FOUR, shard=Shard(2, 4))
    current = batchvl.status(tmp_path)
    assert states(current) == ["complete", "stopped", "stopped", "waiting"]
    assert (current.expected, current.rows, current.ok, current.failed) == (42, 16, 12, 4)
    assert current.failures == {"http_status": 1, "missing_file": 3}
    assert (current.complete, current.rows_per_second, current.eta_seconds, current.stale) == (False, None, None, [])
    assert current.states == {"complete": 1, "running": 0, "stale": 0, "stopped": 2, "waiting": 1}
    shards = [(shard.expected, shard.rows, shard.attempt) for shard in current.shards]
    assert shards == [(10, 10, 1), (11, 5, 2), (10, 1, 1), (11, 0, None)]
    assert current.shards[1].failures == {"http_status": 1, "missing_file": 2}
    assert "to resume: run the same command again for shards 1-2" in str(current)


async def test_a_row_is_counted_once_by_precedence(tmp_path: Path) -> None:
    first = ResultStore.open(tmp_path, RUN_FILE)
    (first.directory / "lock").unlink()
    second = ResultStore.open(tmp_path, RUN_FILE)  # the attempts do not see each other
    for row in range(10):
        first.add(failed(row, "row_timeout"))
        second.add(failed(row) if row < 4 else sample(row))
    await asyncio.gather(first.close(), second.close())
    current = batchvl.status(tmp_path)
    assert (current.rows, current.ok, current.failures) == (10, 6, {"row_timeout": 4})


async def test_shards_without_rows_are_complete(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=3, total=1)
    await fill(tmp_path, [], run_file, shard=Shard(0, 3))
    assert states(batchvl.status(tmp_path)) == ["complete", "complete", "waiting"]
    await fill(tmp_path, [sample(0)], run_file, shard=Shard(2, 3), complete=True)
    assert batchvl.status(tmp_path).complete


async def test_rate_and_time_left_of_a_running_attempt(tmp_path: Path) -> None:
    await fill(tmp_path, rows_of(0)[:4], FOUR, shard=Shard(0, 4))  # rows of an earlier attempt do not count
    output = ResultStore.open(tmp_path, FOUR, Shard(0, 4), options=options())
    assert batchvl.status(tmp_path).rows_per_second is None
    output.describe({"engine": "fake"})
    output.add(sample(4))
    output.add(sample(5))
    await wait_until(lambda: batchvl.status(tmp_path).rows == 6)
    attempt = output.directory / "attempt-0002.json"
    last = (output.directory / "journal-0002-000001.log").stat().st_mtime
    attempt.write_text(json.dumps(json.loads(attempt.read_text()) | {"up": last - 8}))
    os.utime(attempt, (last, last))
    current = batchvl.status(tmp_path)
    shard = current.shards[0]
    assert (shard.state, shard.rows_per_second, shard.eta_seconds) == ("running", 0.25, 16.0)
    assert (current.rows_per_second, current.eta_seconds) == (0.25, (42 - 6) / 0.25), (
        "includes shards that have not started"
    )
    await output.close()
    assert batchvl.status(tmp_path).shards[0].rows_per_second is None


async def test_an_estimated_total_makes_no_shard_complete(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, RUN_FILE, options=options())
    assert batchvl.status(tmp_path).expected is None
    output.heartbeat(3)
    for row in range(3):
        output.add(sample(row))
    await wait_until(lambda: batchvl.status(tmp_path).rows == 3)
    current = batchvl.status(tmp_path)
    assert (current.expected, current.estimated, states(current)) == (3, True, ["running"])
    assert "3 of about 3 rows" in str(current)
    await output.close(complete=True, total=3)
    current = batchvl.status(tmp_path)
    assert (current.expected, current.estimated, current.complete) == (3, False, True)


async def test_a_runner_on_another_host_is_judged_by_its_last_activity(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, RUN_FILE, options=options())
    output.add(sample(0))
    await wait_until(lambda: batchvl.status(tmp_path).rows == 1)
    directory = output.directory
    change_holder(directory / "lock", host="node7", start="another-boot pid:[1] 5")
    current = batchvl.status(tmp_path).shards[0]
    assert (current.state, current.host, current.pid) == ("running", "node7", os.getpid())
    age(directory, STALE_SECONDS)
    current = batchvl.status(tmp_path)
    assert (states(current), current.stale) == (["stale"], [0])
    assert STALE_SECONDS <= (current.last_sign_seconds or 0) < STALE_SECONDS + 30
    output.heartbeat(None)
    assert states(batchvl.status(tmp_path)) == ["running"]
    await output.close()
    assert states(batchvl.status(tmp_path)) == ["stopped"]


async def test_a_living_process_on_this_host_is_running_however_quiet(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, RUN_FILE, options=options())
    output.add(sample(0))
    await wait_until(lambda: batchvl.status(tmp_path).rows == 1)
    age(output.directory, QUIET_SECONDS + 3600)
    current = batchvl.status(tmp_path)
    assert states(current) == ["running"]
    assert "no new row for 65 min" in str(current)
    change_holder(output.directory / "lock", start=Holder.me().start + "0")
    assert states(batchvl.status(tmp_path)) == ["stale"], "the PID belongs to another process now"
    await output.close()


def test_a_heartbeat_after_the_release_writes_nothing(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, RUN_FILE)
    lock = output.directory / "lock"
    assert lock.stat().st_size
    asyncio.run(output.close())
    output.heartbeat(5)
    assert lock.stat().st_size == 0


HOLDER = """
import sys, time
from pathlib import Path
from batchvl.results import ResultStore
from tests.results.samples import RUN_FILE
ResultStore.open(Path(sys.argv[1]), RUN_FILE)
print("open", flush=True)
time.sleep(600)
"""


def test_a_killed_runner_is_stale_immediately(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == b"open\n"
        watching = watch(tmp_path, 0)
        assert states(next(watching)) == ["running"]
        process.send_signal(signal.SIGSTOP)
        assert states(next(watching)) == ["running"]
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert states(next(watching)) == ["stale"], "although it is a zombie"
    current = next(watching).shards[0]
    assert (current.state, current.attempt, current.pid) == ("stale", 1, process.pid)
    asyncio.run(ResultStore.open(tmp_path, RUN_FILE).close())
    assert states(next(watching)) == ["stopped"], "the state of the attempt after it"


async def test_a_retry_is_running_although_all_rows_are_done(tmp_path: Path) -> None:
    from batchvl.results import RetrySelection

    run_file = replace(RUN_FILE, total=2)
    await fill(tmp_path, [sample(0), failed(1)], run_file, complete=True)
    assert batchvl.status(tmp_path).complete
    output = ResultStore.open(tmp_path, run_file, retry=RetrySelection.of(all=True), options=options())
    current = batchvl.status(tmp_path).shards[0]
    assert (current.state, current.retry, current.rows, current.eta_seconds) == ("running", 1, 2, None)
    await output.close()
    assert states(batchvl.status(tmp_path)) == ["stopped"]
    await fill(tmp_path, [sample(1)], run_file, retry=RetrySelection.of(all=True), complete=True)
    current = batchvl.status(tmp_path)
    assert (current.complete, current.ok, current.failures) == (True, 2, {})


async def test_only_new_files_and_records_are_read(tmp_path: Path) -> None:
    """A part that was read once and damaged afterwards is not read again; new records are read."""
    output = ResultStore.open(tmp_path, RUN_FILE, options=options(part_rows=10))
    output.describe({})
    watching = watch(tmp_path, 0)
    counted = []
    for row in range(25):
        output.add(sample(row) if row % 5 else failed(row))
        await wait_until(lambda row=row: counted.append(next(watching).rows) or counted[-1] > row)
    assert counted == sorted(counted)
    part = output.directory / "part-0001-000001.parquet"
    await wait_until(part.exists)
    current = next(watching)
    part.write_bytes(b"PAR1 damaged")
    output.add(failed(25, "http_status"))
    await wait_until(lambda: next(watching).rows == 26)
    current = next(watching)
    assert (current.rows, current.failures, current.shards[0].message) == (
        26,
        {"http_status": 1, "missing_file": 5},
        "",
    )
    assert "damaged" in batchvl.status(tmp_path).shards[0].message
    await output.close()


async def test_a_damaged_file_is_reported_and_the_others_count(tmp_path: Path) -> None:
    output = await fill(tmp_path, [sample(row) for row in range(30)], part_rows=10)
    part = output.directory / "part-0001-000002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    watching = watch(tmp_path, 0)
    for _ in range(2):
        current = next(watching)
        assert current.rows == 20
        assert "part-0001-000002.parquet: damaged" in current.shards[0].message
    part.write_bytes(whole)
    current = next(watching)
    assert (current.rows, current.shards[0].message) == (30, "")
    part.rename(tmp_path / "elsewhere")
    assert next(watching).rows == 20, "the message of a damaged part advises this"


@dataclass(frozen=True)
class ListedEarly(ShardDirectory):
    """A directory that was listed before its journals became parts."""

    def keys(self) -> tuple[set[SegmentKey], set[SegmentKey]]:
        return {(1, number) for number in (1, 2, 3)}, set()


async def test_a_journal_that_becomes_a_part_between_listing_and_reading(tmp_path: Path) -> None:
    output = await fill(tmp_path, [sample(row) for row in range(30)], part_rows=10)
    poller = ShardPoller(ListedEarly(output.directory, Shard()))
    poller.poll()
    assert (poller.counts.ok, poller.problem) == (30, "")


async def test_a_run_that_rolls_back_while_it_is_watched(tmp_path: Path) -> None:
    run_file = replace(RUN_FILE, shards=2, total=2)
    await fill(tmp_path, [sample(0)], run_file, shard=Shard(0, 2), complete=True)
    output = ResultStore.open(tmp_path, run_file, Shard(1, 2))
    watching = watch(tmp_path, 0)
    assert states(next(watching)) == ["complete", "running"]
    await output.close()
    output.roll_back(logs=False)
    assert states(next(watching)) == ["complete", "waiting"]


async def open_with_rows(out: Path) -> ResultStore:
    """Return an active attempt that has written a journal, after one that has made parts."""
    await fill(out, [sample(row) for row in range(15)], part_rows=10)
    output = ResultStore.open(out, RUN_FILE, options=options())
    output.add(sample(20))
    await wait_until(lambda: batchvl.status(out).rows == 16)
    return output


async def test_status_writes_nothing(tmp_path: Path) -> None:
    output = await open_with_rows(tmp_path)

    def files() -> dict[str, tuple[int, int, int]]:
        stats = ((path, path.stat()) for path in (tmp_path, *tmp_path.rglob("*")))
        return {str(path): (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size) for path, stat in stats}

    before = files()
    assert batchvl.status(tmp_path).rows == 16
    assert files() == before
    await output.close()


@pytest.fixture
def read_only(tmp_path: Path):
    """Yield a directory, and a read-only mount of it."""
    directory, mount = tmp_path / "out", tmp_path / "mount"
    directory.mkdir()
    mount.mkdir()
    command = f"mount --bind {directory} {mount} && mount -o remount,bind,ro {mount}"
    mounted = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    try:
        if mounted.returncode:
            pytest.skip(f"a read-only mount is not possible here: {mounted.stderr.strip()}")
        yield directory, mount
    finally:
        subprocess.run(["umount", "-l", mount], capture_output=True)


async def test_a_read_only_file_system(read_only: tuple[Path, Path]) -> None:
    directory, mount = read_only
    output = await open_with_rows(directory)
    with pytest.raises(OSError, match="Read-only"):
        (mount / "x").touch()
    current = batchvl.status(mount)
    assert (states(current), current.rows, current.shards[0].message) == (["running"], 16, "")
    await output.close()


def test_paths_that_are_no_output(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ResumeError, match=r"not a batchvl output: no run\.json found"):
            batchvl.status(path)
    asyncio.run(fill(tmp_path, [sample(0)]))
    run = tmp_path / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"format": 99}))
    with pytest.raises(ResumeError, match="has format 99"):
        batchvl.status(tmp_path)
    run.unlink()
    watching = watch(shutil.copytree(only_shard(tmp_path).path, tmp_path / "x" / "shard-00000-of-00001").parent)
    with pytest.raises(ResumeError, match="not a batchvl output"):
        next(watching)


def status_of(shards: list[ShardStatus]) -> Status:
    return Status(
        output="out",
        manifest="m.parquet",
        time="2026-01-01T00:00:00+00:00",
        complete=False,
        expected=25_600,
        estimated=False,
        rows=sum(shard.rows for shard in shards),
        ok=0,
        failed=0,
        failures={},
        rows_per_second=None,
        eta_seconds=None,
        last_sign=None,
        last_sign_seconds=None,
        stale=[],
        shards=shards,
        states={state: sum(s.state == state for s in shards) for state in ("complete", "running", "stale", "waiting")},
    )


def shard_status(number: int) -> ShardStatus:
    """Return one of 150 complete, 100 running (the first one the slowest), 2 stale and 4 waiting shards."""
    state = "complete" if number < 150 else "running" if number < 250 else "stale" if number < 252 else "waiting"
    rows = 100 if state == "complete" else 0 if state == "waiting" else 50
    eta = 10_000.0 / (number - 149) if state == "running" else None
    return ShardStatus(
        shard=number, state=state, expected=100, rows=rows, ok=rows, failed=0, failures={}, eta_seconds=eta
    )


def test_of_many_shards_the_important_ones_are_listed() -> None:
    current = status_of([shard_status(number) for number in range(256)])
    lines = current.text().splitlines()
    shown = [line.split()[:2] for line in lines if line.strip() and line.split()[0].isdecimal()][1:]
    assert shown == [[str(n), "running"] for n in range(150, 180)] + [["250", "stale"], ["251", "stale"]]
    assert lines[-1] == "… and 224 more (use --all to list every shard)"
    assert "256 shards: 150 complete, 100 running, 2 stale, 4 waiting" in lines
    assert "to resume: run the same command again for shards 250-251" in lines
    assert len(current.text(all=True).splitlines()) > 256

    small = current.text(height=12, width=40).splitlines()
    assert len(small) == 12
    assert max(map(len, small)) == 40
    assert [line.split()[0] for line in small[-6:]] == ["150", "151", "152", "250", "251", "…"]


def test_columns_are_aligned_with_their_headers() -> None:
    current = status_of([shard_status(number) for number in (0, 150, 250, 252)])
    table = current.text().split("\n\n")[1].splitlines()
    for name, line, value in ((" rows done", 1, "100 of 100"), ("time left", 2, "2:46:40"), ("state", 3, "stale")):
        end = table[0].index(name) + (len(name) if name != "state" else 0)
        at = slice(end - len(value), end) if name != "state" else slice(end, end + len(value))
        assert table[line][at] == value


COMMON_FIELDS = "expected rows ok failed failures rows_per_second eta_seconds last_sign last_sign_seconds"
FIELDS = {*COMMON_FIELDS.split(), *["output", "manifest", "time", "complete", "estimated", "states", "stale", "shards"]}
SHARD_ONLY_FIELDS = "shard state attempt retry host pid since last_row_seconds message"
SHARD_FIELDS = {*COMMON_FIELDS.split(), *SHARD_ONLY_FIELDS.split()}


async def test_the_json_fields(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(0)], FOUR, shard=Shard(0, 4))
    text = batchvl.status(tmp_path).as_json()
    current = json.loads(text)
    assert set(current) == FIELDS
    assert [set(shard) for shard in current["shards"]] == [SHARD_FIELDS] * 4
    assert msgspec.json.decode(text, type=Status).rows == 1
    assert set(current["states"]) == {"complete", "running", "stale", "stopped", "waiting"}


WRITERS = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from batchvl.results import ResultStore
from batchvl.config.units import Shard
from tests.results.samples import RUN_FILE, failed, options, sample

async def shard(out, index, count, rows):
    run_file = replace(RUN_FILE, shards=count, total=count * rows)
    # Small commits and parts, so that files appear and disappear all the time.
    small = options(commit_seconds=0.2, part_rows=rows // 4)
    output = ResultStore.open(out, run_file, Shard(index, count), options=small)
    await asyncio.sleep(0.5)
    output.describe({"engine": "fake"})
    for row in Shard(index, count).rows(count * rows):
        await output.wait_for_capacity()
        output.add(sample(row) if row % 10 else failed(row))
        await asyncio.sleep(0.05)
    await output.close(complete=True)

async def main(out, first, last, count, rows):
    await asyncio.gather(*(shard(out, index, count, rows) for index in range(first, last)))

asyncio.run(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
"""


@pytest.mark.parametrize(("count", "rows"), [(16, 20), pytest.param(256, 60, marks=pytest.mark.slow)])
def test_status_while_all_shards_write(tmp_path: Path, count: int, rows: int) -> None:
    """Status raises no error, the rows of a shard never decrease, and every writer can start."""
    writers = 4
    cuts = [count * number // writers for number in range(writers + 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITERS, *map(str, (tmp_path / "out", first, last, count, rows))],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for first, last in pairwise(cuts)
    ]
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "out" / "run.json").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        before, polls, seen = [0] * count, 0, set()
        for current in watch(tmp_path / "out", 0):
            now = [shard.rows for shard in current.shards]
            assert all(old <= new for old, new in zip(before, now, strict=True))
            assert not any(shard.message for shard in current.shards)
            assert set(states(current)) <= {"waiting", "running", "complete"}
            before, polls = now, polls + 1
            seen.update(states(current))
            if polls % 10 == 0:  # a first poll returns at least as many rows
                assert batchvl.status(tmp_path / "out").rows >= current.rows
        assert (current.rows, current.failed) == (count * rows, count * rows // 10)
        assert polls > 10
        assert "running" in seen
        for process in processes:
            assert (process.wait(60), process.stderr and process.stderr.read()) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
