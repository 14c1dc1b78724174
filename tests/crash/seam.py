"""Kills before, after and in the middle of every call that an attempt makes to its disk.

    python -m tests.crash.seam SCRATCH [POINTS [SEED]]

Runs in its own process with one thread, which forks a child for each attempt to kill and one for each check of what it
left, so that hundreds of kills take seconds. POINTS is a number of points to draw with SEED. Prints figures as JSON.
Only `ResultStore` is exercised; `campaign.py` and the tests of faults kill whole runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Set
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from batchvl.errors import StoppedEarly
from batchvl.results import Counts, ResultStore, merge
from batchvl.results.record import to_batch
from batchvl.storage.disk import Disk

from ..results.samples import RUN_FILE, options, sample
from .disks import Killing, KillingNoLinks, NoLinks, Seam
from .ledger import Ledger

ROWS, PART_ROWS, COMMIT_ROWS = 24, 10, 4

Point = tuple[bool, int, str, int]
"""Whether there are hard links; number of the call or write; before, after or in the middle; part of the write."""


def attempt(out: Path, disk: Disk, report: Callable[[Iterable[int]], None]) -> None:
    """Make an attempt at all rows, and merge: with journals, parts, and every rename in between.

    Args:
        out: The output directory.
        disk: The disk to use.
        report: Called with the rows that have become durable.

    Raises:
        StoppedEarly: The disk failed; the lock is released.
    """

    async def write() -> None:
        pending: list[int] = []
        committed = asyncio.Event()

        def on_commit(counts: Counts) -> None:
            report(pending[: counts.rows])
            del pending[: counts.rows]
            committed.set()

        small = options(commit_seconds=0.003, part_rows=PART_ROWS)
        output = ResultStore.open(out, RUN_FILE, options=small, on_commit=on_commit, disk=disk)
        report(output.done)
        try:
            output.describe({"engine": "fake"})
            rows = list(output.done.missing(range(ROWS)))
            for start in range(0, len(rows), COMMIT_ROWS):
                committed.clear()
                for row in rows[start : start + COMMIT_ROWS]:
                    pending.append(row)
                    output.add(sample(row))
                while not committed.is_set():
                    await output.wait_for_capacity()  # raises if the writer has failed
                    await asyncio.sleep(0)
        except BaseException:
            with suppress(StoppedEarly):
                await output.close()
            raise
        await output.close(complete=True, total=ROWS)

    asyncio.run(write())
    merge(out, disk=disk)


def check(out: Path, reported: Set[int], disk: Disk) -> None:
    """Check that reported rows are there, then resume and check all results. Raises AssertionError."""
    ledger = Ledger(out, RUN_FILE.schema)
    rows = ledger.rows() if (out / "run.json").exists() else {}
    assert reported <= rows.keys(), f"reported {sorted(reported)}, found {sorted(rows)}"
    if rows:
        ledger.check(out.parent)
    attempt(out, disk, lambda rows: None)
    ledger.check(out.parent)
    table = pq.read_table(out / "results.parquet")
    expected = to_batch([sample(row) for row in range(ROWS)], RUN_FILE.schema)
    assert table.equals(pa.Table.from_batches([expected]))


def forked(work: Callable[[], None]) -> int:
    """Do the work in a forked child; return 0, 1 if it raised, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Series:
    """Kills at one point after another, each in a new directory."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.figures: Counter[str] = Counter()

    def points(self) -> list[Point]:
        """Return all points, counted in an undisturbed attempt."""
        points: list[Point] = []
        for links in (True, False):
            names = self._calls(links)
            self.figures["calls" if links else "calls without hard links"] = len(names)
            for call in range(1, len(names) + 1):
                points += [(links, call, "before", 0), (links, call, "after", 0)]
            for write in range(1, names.count("write") + 1):
                points += [(links, write, "middle", part) for part in (2, 10**9)]
        return points

    def _calls(self, links: bool) -> list[str]:
        out, names = self._scratch / "counted", self._scratch / "names"

        def count() -> None:
            disk = Seam() if links else NoLinks()
            attempt(out, disk, lambda rows: None)
            names.write_text(" ".join(disk.names))

        assert forked(count) == 0
        shutil.rmtree(out)
        return names.read_text().split()

    def kill(self, point: Point) -> None:
        """Kill an attempt at the point, then resume it. Raises AssertionError, in which case the directory is kept."""
        links, call, when, part = point
        out = self._scratch / "{}-{}-{}-{}".format("links" if links else "none", call, when, part)
        receive, send = os.pipe()

        def work() -> None:
            disk = (Killing if links else KillingNoLinks)(call, when, part)
            attempt(out, disk, lambda rows: os.write(send, bytes(rows)) and None)

        code = forked(work)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            reported = set(pipe.read())
        if code == 0:  # fewer calls than when they were counted: some depend on the timing of the writer's thread
            self.figures["missed"] += 1
        else:
            assert code == -signal.SIGKILL, f"{point}: ended with {code}"
            self.figures["kills in the middle of a write" if when == "middle" else f"kills {when} a call"] += 1
        code = forked(lambda: check(out, reported, Seam() if links else NoLinks()))
        assert code == 0, f"{point}: {out}: see the failed check above"
        shutil.rmtree(out)


def main() -> None:
    series = Series(Path(sys.argv[1]))
    points = series.points()
    if len(sys.argv) > 2:
        points = random.Random(int(sys.argv[3]) if len(sys.argv) > 3 else 0).sample(points, int(sys.argv[2]))
    for point in points:
        series.kill(point)
    print(json.dumps(series.figures))


if __name__ == "__main__":
    main()
