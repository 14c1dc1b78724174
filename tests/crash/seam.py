"""Kills before, after and in the middle of any of the calls that an attempt makes to its disk.

    python -m tests.crash.seam SCRATCH [POINTS [SEED]]

Runs as a process of its own, which has one thread and forks: a child for each attempt that is killed, and one for each
look at what it left, so that hundreds of kills take seconds. POINTS: so many of all, drawn with SEED. Prints figures as
JSON. The records, and the calls, are those of `ResultStore` alone; `campaign.py` and the tests of faults kill whole
runs.
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

from ..results.samples import GUARD, options, sample
from .disks import Killing, KillingNoLinks, NoLinks, Seam
from .ledger import Ledger

ROWS, PART_ROWS, COMMIT_ROWS = 24, 10, 4

Point = tuple[bool, int, str, int]
"""Whether there are hard links, the call's number or the write's, when, and which part of the write."""


def attempt(out: Path, disk: Disk, told: Callable[[Iterable[int]], None]) -> None:
    """An attempt at all rows, and the merge: journals, parts, and every rename between. Tells which rows are durable.

    Raises StoppedEarly, having given up the lock.
    """

    async def write() -> None:
        pending: list[int] = []
        committed = asyncio.Event()

        def on_commit(counts: Counts) -> None:
            told(pending[: counts.rows])
            del pending[: counts.rows]
            committed.set()

        small = options(commit_seconds=0.003, part_rows=PART_ROWS)
        output = ResultStore.open(out, GUARD, options=small, on_commit=on_commit, disk=disk)
        told(output.done)
        try:
            output.describe({"engine": "fake"})
            rows = list(output.done.missing(range(ROWS)))
            for at in range(0, len(rows), COMMIT_ROWS):
                committed.clear()
                for row in rows[at : at + COMMIT_ROWS]:
                    pending.append(row)
                    output.add(sample(row))
                while not committed.is_set():
                    await output.wait_for_capacity()  # which tells of a failure
                    await asyncio.sleep(0)
        except BaseException:
            with suppress(StoppedEarly):
                await output.close()
            raise
        await output.close(complete=True, total=ROWS)

    asyncio.run(write())
    merge(out, disk=disk)


def look(out: Path, told: Set[int], disk: Disk) -> None:
    """What was told is there; the same again goes on, and all is right. Raises AssertionError."""
    ledger = Ledger(out, GUARD.schema)
    found = ledger.rows() if (out / "run.json").exists() else {}
    assert told <= found.keys(), f"told of {sorted(told)}; there are {sorted(found)}"
    if found:
        ledger.check(out.parent)
    attempt(out, disk, lambda rows: None)
    ledger.check(out.parent)
    table = pq.read_table(out / "results.parquet")
    expected = to_batch([sample(row) for row in range(ROWS)], GUARD.schema)
    assert table.equals(pa.Table.from_batches([expected]))


def forked(work: Callable[[], None]) -> int:
    """How a child ends that does this: 0, 1 where it raised, or minus the signal that killed it."""
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
    """One point after the other, each in a folder of its own."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.figures: Counter[str] = Counter()

    def points(self) -> list[Point]:
        """All there are, which an attempt that nobody kills tells."""
        found: list[Point] = []
        for links in (True, False):
            names = self._calls(links)
            self.figures["calls" if links else "calls without hard links"] = len(names)
            for call in range(1, len(names) + 1):
                found += [(links, call, "before", 0), (links, call, "after", 0)]
            for write in range(1, names.count("write") + 1):
                found += [(links, write, "middle", part) for part in (2, 10**9)]
        return found

    def _calls(self, links: bool) -> list[str]:
        out, told = self._scratch / "counted", self._scratch / "names"

        def count() -> None:
            disk = Seam() if links else NoLinks()
            attempt(out, disk, lambda rows: None)
            told.write_text(" ".join(disk.names))

        assert forked(count) == 0
        shutil.rmtree(out)
        return told.read_text().split()

    def kill(self, point: Point) -> None:
        """Kills an attempt there, then has another go on. Raises AssertionError; the folder stays where it is then."""
        links, call, when, part = point
        out = self._scratch / "{}-{}-{}-{}".format("links" if links else "none", call, when, part)
        receive, send = os.pipe()

        def work() -> None:
            disk = (Killing if links else KillingNoLinks)(call, when, part)
            attempt(out, disk, lambda rows: os.write(send, bytes(rows)) and None)

        code = forked(work)
        os.close(send)
        with os.fdopen(receive, "rb") as pipe:
            told = set(pipe.read())
        if code == 0:  # it took fewer calls than when they were counted: some depend on when the writer's thread wakes
            self.figures["missed"] += 1
        else:
            assert code == -signal.SIGKILL, f"{point}: ended with {code}"
            self.figures["kills in the middle of a write" if when == "middle" else f"kills {when} a call"] += 1
        code = forked(lambda: look(out, told, Seam() if links else NoLinks()))
        assert code == 0, f"{point}: {out} is not as it must be: see above"
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
