"""What `status` finds in an output folder, whatever is going on there."""

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

from .samples import GUARD, failed, fill, only_folder, options, sample

FOUR = replace(GUARD, shards=4, total=42)  # of 10, 11, 10 and 11 rows


def states(found: Status) -> list[str]:
    return [shard.state for shard in found.shards]


def rows_of(index: int) -> list[Record]:
    return [sample(row) for row in Shard(index, 4).rows(42)]


def aged(folder: Path, seconds: float) -> None:
    """Makes all files of the folder so much older."""
    for path in folder.iterdir():
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def change_holder(lock: Path, **changed: str | int) -> None:
    found = msgspec.json.decode(lock.read_bytes(), type=Holder)
    lock.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, **changed)))


async def until(true: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


async def test_all_shards_together_and_each(tmp_path: Path) -> None:
    await fill(tmp_path, rows_of(0), FOUR, shard=Shard(0, 4), complete=True)
    await fill(tmp_path, [failed(10, "http_status"), failed(11), sample(12)], FOUR, shard=Shard(1, 4))
    await fill(tmp_path, [failed(13), sample(14)], FOUR, shard=Shard(1, 4))
    await fill(tmp_path, [failed(21)], FOUR, shard=Shard(2, 4))
    found = batchvl.status(tmp_path)
    assert states(found) == ["complete", "stopped", "stopped", "waiting"]
    assert (found.expected, found.rows, found.ok, found.failed) == (42, 16, 12, 4)
    assert found.failures == {"http_status": 1, "missing_file": 3}
    assert (found.complete, found.rows_per_second, found.eta_seconds, found.stale) == (False, None, None, [])
    assert found.states == {"complete": 1, "running": 0, "stale": 0, "stopped": 2, "waiting": 1}
    assert [(shard.expected, shard.rows, shard.attempt) for shard in found.shards] == [
        (10, 10, 1), (11, 5, 2), (10, 1, 1), (11, 0, None)
    ]  # fmt: skip
    assert found.shards[1].failures == {"http_status": 1, "missing_file": 2}
    assert "to go on: the same command again, of shards 1-2" in str(found)


async def test_a_row_is_counted_once_for_the_result_that_wins(tmp_path: Path) -> None:
    first = ResultStore.open(tmp_path, GUARD)
    (first.directory / "lock").unlink()
    second = ResultStore.open(tmp_path, GUARD)  # two attempts that do not see each other
    for row in range(10):
        first.add(failed(row, "row_timeout"))
        second.add(failed(row) if row < 4 else sample(row))
    await asyncio.gather(first.close(), second.close())
    found = batchvl.status(tmp_path)
    assert (found.rows, found.ok, found.failures) == (10, 6, {"row_timeout": 4})


async def test_shards_without_rows_are_complete_from_the_start(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=3, total=1)
    await fill(tmp_path, [], guard, shard=Shard(0, 3))
    assert states(batchvl.status(tmp_path)) == ["complete", "complete", "waiting"]
    await fill(tmp_path, [sample(0)], guard, shard=Shard(2, 3), complete=True)
    assert batchvl.status(tmp_path).complete


async def test_rate_and_time_left_are_of_what_runs_since_its_engine_was_up(tmp_path: Path) -> None:
    await fill(tmp_path, rows_of(0)[:4], FOUR, shard=Shard(0, 4))  # an earlier attempt's rows have no part in it
    output = ResultStore.open(tmp_path, FOUR, Shard(0, 4), options=options())
    assert batchvl.status(tmp_path).rows_per_second is None
    output.describe({"engine": "fake"})
    output.add(sample(4))
    output.add(sample(5))
    await until(lambda: batchvl.status(tmp_path).rows == 6)
    attempt = output.directory / "attempt-0002.json"
    last = (output.directory / "journal-0002-000001.log").stat().st_mtime
    attempt.write_text(json.dumps(json.loads(attempt.read_text()) | {"up": last - 8}))
    os.utime(attempt, (last, last))
    found = batchvl.status(tmp_path)
    shard = found.shards[0]
    assert (shard.state, shard.rows_per_second, shard.eta_seconds) == ("running", 0.25, 16.0)
    assert (found.rows_per_second, found.eta_seconds) == (0.25, (42 - 6) / 0.25), "for shards that have not begun"
    await output.close()
    assert batchvl.status(tmp_path).shards[0].rows_per_second is None


async def test_a_total_that_is_an_estimate_makes_nothing_complete(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD, options=options())
    assert batchvl.status(tmp_path).expected is None
    output.heartbeat(3)
    for row in range(3):
        output.add(sample(row))
    await until(lambda: batchvl.status(tmp_path).rows == 3)
    found = batchvl.status(tmp_path)
    assert (found.expected, found.estimated, states(found)) == (3, True, ["running"])
    assert "3 of about 3 rows" in str(found)
    await output.close(complete=True, total=3)
    found = batchvl.status(tmp_path)
    assert (found.expected, found.estimated, found.complete) == (3, False, True)


async def test_a_runner_elsewhere_is_judged_by_its_signs_of_life(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD, options=options())
    output.add(sample(0))
    await until(lambda: batchvl.status(tmp_path).rows == 1)
    folder = output.directory
    change_holder(folder / "lock", host="node7", start="another-boot pid:[1] 5")
    found = batchvl.status(tmp_path).shards[0]
    assert (found.state, found.host, found.pid) == ("running", "node7", os.getpid())
    aged(folder, STALE_SECONDS)
    found = batchvl.status(tmp_path)
    assert (states(found), found.stale) == (["stale"], [0])
    assert STALE_SECONDS <= (found.last_sign_seconds or 0) < STALE_SECONDS + 30
    output.heartbeat(None)
    assert states(batchvl.status(tmp_path)) == ["running"]
    await output.close()
    assert states(batchvl.status(tmp_path)) == ["stopped"]


async def test_a_runner_that_lives_here_is_running_however_quiet(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD, options=options())
    output.add(sample(0))
    await until(lambda: batchvl.status(tmp_path).rows == 1)
    aged(output.directory, QUIET_SECONDS + 3600)
    found = batchvl.status(tmp_path)
    assert states(found) == ["running"]
    assert "no row for 65 min" in str(found)
    change_holder(output.directory / "lock", start=Holder.me().start + "0")
    assert states(batchvl.status(tmp_path)) == ["stale"], "the number is another process's by now"
    await output.close()


def test_a_beat_after_the_release_writes_nothing(tmp_path: Path) -> None:
    output = ResultStore.open(tmp_path, GUARD)
    lock = output.directory / "lock"
    assert lock.stat().st_size
    asyncio.run(output.close())
    output.heartbeat(5)
    assert lock.stat().st_size == 0


HOLDER = """
import sys, time
from pathlib import Path
from batchvl.results import ResultStore
from tests.results.samples import GUARD
ResultStore.open(Path(sys.argv[1]), GUARD)
print("open", flush=True)
time.sleep(600)
"""


def test_a_runner_that_was_killed_is_stale_at_once(tmp_path: Path) -> None:
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
        assert states(next(watching)) == ["stale"], "though nobody has reaped it yet"
    found = next(watching).shards[0]
    assert (found.state, found.attempt, found.pid) == ("stale", 1, process.pid)
    asyncio.run(ResultStore.open(tmp_path, GUARD).close())
    assert states(next(watching)) == ["stopped"], "by the attempt that came after it"


async def test_a_retry_is_at_work_though_all_rows_are_done(tmp_path: Path) -> None:
    from batchvl.results import RetrySelection

    guard = replace(GUARD, total=2)
    await fill(tmp_path, [sample(0), failed(1)], guard, complete=True)
    assert batchvl.status(tmp_path).complete
    output = ResultStore.open(tmp_path, guard, retry=RetrySelection.of(all=True), options=options())
    found = batchvl.status(tmp_path).shards[0]
    assert (found.state, found.retry, found.rows, found.eta_seconds) == ("running", 1, 2, None)
    await output.close()
    assert states(batchvl.status(tmp_path)) == ["stopped"]
    await fill(tmp_path, [sample(1)], guard, retry=RetrySelection.of(all=True), complete=True)
    found = batchvl.status(tmp_path)
    assert (found.complete, found.ok, found.failures) == (True, 2, {})


async def test_only_what_is_new_is_read(tmp_path: Path) -> None:
    """A part that was read once and damaged in place is not read again; what comes after it is."""
    output = ResultStore.open(tmp_path, GUARD, options=options(part_rows=10))
    output.describe({})
    watching = watch(tmp_path, 0)
    counted = []
    for row in range(25):
        output.add(sample(row) if row % 5 else failed(row))
        await until(lambda row=row: counted.append(next(watching).rows) or counted[-1] > row)
    assert counted == sorted(counted)
    part = output.directory / "part-0001-000001.parquet"
    await until(part.exists)
    found = next(watching)
    part.write_bytes(b"PAR1 no more")
    output.add(failed(25, "http_status"))
    await until(lambda: next(watching).rows == 26)
    found = next(watching)
    assert (found.rows, found.failures, found.shards[0].message) == (26, {"http_status": 1, "missing_file": 5}, "")
    assert "damaged" in batchvl.status(tmp_path).shards[0].message
    await output.close()


async def test_a_damaged_file_is_told_and_the_others_count(tmp_path: Path) -> None:
    output = await fill(tmp_path, [sample(row) for row in range(30)], part_rows=10)
    part = output.directory / "part-0001-000002.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:100])
    watching = watch(tmp_path, 0)
    for _ in range(2):
        found = next(watching)
        assert found.rows == 20
        assert "part-0001-000002.parquet: damaged" in found.shards[0].message
    part.write_bytes(whole)
    found = next(watching)
    assert (found.rows, found.shards[0].message) == (30, "")
    part.rename(tmp_path / "elsewhere")
    assert next(watching).rows == 20, "as the message of a damaged part advises"


@dataclass(frozen=True)
class Late(ShardDirectory):
    """Has been listed before its journals became parts."""

    def keys(self) -> tuple[set[SegmentKey], set[SegmentKey]]:
        return {(1, number) for number in (1, 2, 3)}, set()


async def test_a_journal_that_becomes_a_part_between_listing_and_reading(tmp_path: Path) -> None:
    output = await fill(tmp_path, [sample(row) for row in range(30)], part_rows=10)
    tracker = ShardPoller(Late(output.directory, Shard()))
    tracker.poll()
    assert (tracker.counts.ok, tracker.problem) == (30, "")


async def test_a_run_that_withdraws_while_it_is_watched(tmp_path: Path) -> None:
    guard = replace(GUARD, shards=2, total=2)
    await fill(tmp_path, [sample(0)], guard, shard=Shard(0, 2), complete=True)
    output = ResultStore.open(tmp_path, guard, Shard(1, 2))
    watching = watch(tmp_path, 0)
    assert states(next(watching)) == ["complete", "running"]
    await output.close()
    output.roll_back(logs=False)
    assert states(next(watching)) == ["complete", "waiting"]


async def at_work(out: Path) -> ResultStore:
    """An attempt that has written a journal and goes on, after one that has made parts."""
    await fill(out, [sample(row) for row in range(15)], part_rows=10)
    output = ResultStore.open(out, GUARD, options=options())
    output.add(sample(20))
    await until(lambda: batchvl.status(out).rows == 16)
    return output


async def test_nothing_is_written(tmp_path: Path) -> None:
    output = await at_work(tmp_path)

    def files() -> dict[str, tuple[int, int, int]]:
        found = ((path, path.stat()) for path in (tmp_path, *tmp_path.rglob("*")))
        return {str(path): (now.st_mtime_ns, now.st_ctime_ns, now.st_size) for path, now in found}

    before = files()
    assert batchvl.status(tmp_path).rows == 16
    assert files() == before
    await output.close()


@pytest.fixture
def read_only(tmp_path: Path):
    """A folder, and the same mounted so that it cannot be written."""
    folder, mount = tmp_path / "out", tmp_path / "mount"
    folder.mkdir()
    mount.mkdir()
    command = f"mount --bind {folder} {mount} && mount -o remount,bind,ro {mount}"
    made = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    try:
        if made.returncode:
            pytest.skip(f"mounting read-only is not possible here: {made.stderr.strip()}")
        yield folder, mount
    finally:
        subprocess.run(["umount", "-l", mount], capture_output=True)


async def test_on_a_file_system_that_cannot_be_written(read_only: tuple[Path, Path]) -> None:
    folder, mount = read_only
    output = await at_work(folder)
    with pytest.raises(OSError, match="Read-only"):
        (mount / "x").touch()
    found = batchvl.status(mount)
    assert (states(found), found.rows, found.shards[0].message) == (["running"], 16, "")
    await output.close()


def test_no_output_folder(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(ResumeError, match=r"not a batchvl output: no run\.json found"):
            batchvl.status(place)
    asyncio.run(fill(tmp_path, [sample(0)]))
    run = tmp_path / "run.json"
    run.write_text(json.dumps(json.loads(run.read_text()) | {"format": 99}))
    with pytest.raises(ResumeError, match="has format 99"):
        batchvl.status(tmp_path)
    run.unlink()
    watching = watch(shutil.copytree(only_folder(tmp_path).path, tmp_path / "x" / "shard-00000-of-00001").parent)
    with pytest.raises(ResumeError, match="not a batchvl output"):
        next(watching)


def found_as(shards: list[ShardStatus]) -> Status:
    return Status(
        output="out", manifest="m.parquet", time="2026-01-01T00:00:00+00:00", complete=False, expected=25_600,
        estimated=False, rows=sum(shard.rows for shard in shards), ok=0, failed=0, failures={}, rows_per_second=None,
        eta_seconds=None, last_sign=None, last_sign_seconds=None, stale=[], shards=shards,
        states={state: sum(s.state == state for s in shards) for state in ("complete", "running", "stale", "waiting")},
    )  # fmt: skip


def a_shard(number: int) -> ShardStatus:
    """150 are complete, 100 run, of which the first is the slowest, 2 are stale, 4 have not begun."""
    state = "complete" if number < 150 else "running" if number < 250 else "stale" if number < 252 else "waiting"
    rows = 100 if state == "complete" else 0 if state == "waiting" else 50
    left = 10_000.0 / (number - 149) if state == "running" else None
    return ShardStatus(
        shard=number, state=state, expected=100, rows=rows, ok=rows, failed=0, failures={}, eta_seconds=left
    )  # fmt: skip


def test_of_many_shards_those_are_shown_that_matter() -> None:
    found = found_as([a_shard(number) for number in range(256)])
    lines = found.text().splitlines()
    shown = [line.split()[:2] for line in lines if line.strip() and line.split()[0].isdecimal()][1:]
    assert shown == [[str(n), "running"] for n in range(150, 180)] + [["250", "stale"], ["251", "stale"]]
    assert lines[-1] == "… and 224 more (--all shows each)"
    assert "256 shards: 150 complete, 100 running, 2 stale, 4 waiting" in lines
    assert "to go on: the same command again, of shards 250-251" in lines
    assert len(found.text(all=True).splitlines()) > 256

    small = found.text(height=12, width=40).splitlines()
    assert len(small) == 12
    assert max(map(len, small)) == 40
    assert [line.split()[0] for line in small[-6:]] == ["150", "151", "152", "250", "251", "…"]


def test_columns_stand_below_their_heads() -> None:
    found = found_as([a_shard(number) for number in (0, 150, 250, 252)])
    table = found.text().split("\n\n")[1].splitlines()
    for name, line, value in ((" rows done", 1, "100 of 100"), ("left", 2, "2:46:40"), ("state", 3, "stale")):
        end = table[0].index(name) + (len(name) if name != "state" else 0)
        at = slice(end - len(value), end) if name != "state" else slice(end, end + len(value))
        assert table[line][at] == value


FIELDS = {
    "output", "manifest", "time", "complete", "expected", "estimated", "rows", "ok", "failed", "failures",
    "rows_per_second", "eta_seconds", "last_sign", "last_sign_seconds", "states", "stale", "shards",
}  # fmt: skip
SHARD_FIELDS = {
    "shard", "state", "expected", "rows", "ok", "failed", "failures", "rows_per_second", "eta_seconds", "attempt",
    "retry", "host", "pid", "since", "last_sign", "last_sign_seconds", "last_row_seconds", "message",
}  # fmt: skip


async def test_json_has_always_the_same_fields(tmp_path: Path) -> None:
    await fill(tmp_path, [sample(0)], FOUR, shard=Shard(0, 4))
    text = batchvl.status(tmp_path).as_json()
    found = json.loads(text)
    assert set(found) == FIELDS
    assert [set(shard) for shard in found["shards"]] == [SHARD_FIELDS] * 4
    assert msgspec.json.decode(text, type=Status).rows == 1
    assert set(found["states"]) == {"complete", "running", "stale", "stopped", "waiting"}


WRITERS = """
import asyncio, sys
from dataclasses import replace
from pathlib import Path
from batchvl.results import ResultStore
from batchvl.config.units import Shard
from tests.results.samples import GUARD, failed, options, sample

async def shard(out, index, count, rows):
    guard = replace(GUARD, shards=count, total=count * rows)
    # As often as they can: parts come and journals go all the time.
    output = ResultStore.open(out, guard, Shard(index, count), options=options(commit_seconds=0.2, part_rows=rows // 4))
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
def test_while_all_shards_write(tmp_path: Path, count: int, rows: int) -> None:
    """Never an error, no shard's rows ever go down, and nobody is kept from starting."""
    writers = 4
    cuts = [count * number // writers for number in range(writers + 1)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITERS, *map(str, (tmp_path / "out", first, last, count, rows))],
            cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True,
        )
        for first, last in pairwise(cuts)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 30
        while not (tmp_path / "out" / "run.json").exists():
            assert time.monotonic() < end
            time.sleep(0.01)
        before, looks, seen = [0] * count, 0, set()
        for found in watch(tmp_path / "out", 0):
            now = [shard.rows for shard in found.shards]
            assert all(old <= new for old, new in zip(before, now, strict=True))
            assert not any(shard.message for shard in found.shards)
            assert set(states(found)) <= {"waiting", "running", "complete"}
            before, looks = now, looks + 1
            seen.update(states(found))
            if looks % 10 == 0:  # at first sight it finds no less
                assert batchvl.status(tmp_path / "out").rows >= found.rows
        assert (found.rows, found.failed) == (count * rows, count * rows // 10)
        assert looks > 10
        assert "running" in seen
        for process in processes:
            assert (process.wait(60), process.stderr and process.stderr.read()) == (0, "")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
