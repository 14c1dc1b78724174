"""Parts in any order come out in the manifest's, each row once, whatever is dealt out on the way."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchvl.errors import BatchvlError
from batchvl.results import Record, parts
from batchvl.results.journal import Journal
from batchvl.results.merging.sort import Limits, read_sorted
from batchvl.results.merging.spill import bucket_starts
from batchvl.results.parts import Group, Part
from batchvl.results.record import schema, to_batch
from batchvl.results.rowset import Outcomes

from ..samples import failed, sample

SCHEMA = schema("string")
TINY = Limits(window=1_000, held=8_000, bucket=2_000)


class Folder:
    """Parts made of records, a few rows a group."""

    def __init__(self, path: Path) -> None:
        self.path, self.parts = path, []
        self.best: dict[int, tuple[tuple[bool, int, int], str | None]] = {}

    def add(self, records: list[Record], attempt: int = 1, retry: int = 0, group: int = 5) -> None:
        records = sorted(records, key=lambda record: record.row)
        for record in records:
            rank = record.status == "failed", -retry, attempt
            if record.row not in self.best or rank < self.best[record.row][0]:
                self.best[record.row] = rank, record.response
        path = self.path / f"{len(self.parts)}.parquet"
        tally = Outcomes()
        for record in records:
            tally.add(record.row, record.error.code if record.error else None)
        with pq.ParquetWriter(path, SCHEMA, write_page_checksum=True) as writer:
            writer.write_table(pa.Table.from_batches([to_batch(records, SCHEMA)]), row_group_size=group)
            writer.add_key_value_metadata(parts.footer(Journal(attempt, retry, b""), tally, {}))
        self.parts.append(Part.read(path))

    def out(self, limits: Limits, scratch: Path) -> list[tuple[int, str | None]]:
        """What comes out, after a look at whether it comes in small tables and leaves nothing behind."""
        found = []
        for table in read_sorted(self.parts, SCHEMA, scratch, limits):
            assert table.schema == SCHEMA
            assert 0 < table.nbytes < 6 * limits.window
            found += zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True)
        assert os.listdir(scratch) == []
        return found

    def wanted(self) -> list[tuple[int, str | None]]:
        return [(row, response) for row, (_, response) in sorted(self.best.items())]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "scratch").mkdir()
    return Folder(tmp_path)


def cut(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_lie_anywhere_several_times(folder: Folder, seed: int) -> None:
    chance = random.Random(seed)
    dealt = 0
    for attempt, retry in ((1, 0), (2, 0), (3, 1), (4, 2)):
        rows = chance.sample(range(250), chance.randint(50, 200))
        for some in cut(rows, chance.randint(10, 60)):
            records = [
                sample(row, response=f"{attempt}" * chance.randint(0, 300)) if chance.random() < 0.7 else failed(row)
                for row in some
            ]
            folder.add(records, attempt, retry, group=chance.randint(1, 20))
    scratch = folder.path / "scratch"
    found = []
    for table in read_sorted(folder.parts, SCHEMA, scratch, TINY):
        found += zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True)
        dealt = max(dealt, len(os.listdir(scratch)))
    assert found == folder.wanted()
    assert dealt > 5, "the rows were dealt out"
    assert folder.out(Limits(), scratch) == folder.wanted(), "and it is the same where they need not be"


def test_rows_in_about_the_manifests_order_are_not_dealt_out(folder: Folder) -> None:
    rows = list(range(600))
    for start in range(0, 600, 20):
        rows[start : start + 20] = reversed(rows[start : start + 20])
    for some in cut(rows, 30):
        folder.add([sample(row) for row in some])
    scratch = folder.path / "scratch"
    scratch.rmdir()  # nothing can be written there
    tables = list(read_sorted(folder.parts, SCHEMA, scratch, TINY))
    assert [row for table in tables for row in table["row"].to_pylist()] == list(range(600))
    assert len(tables) > 20


def test_many_attempts_at_the_same_rows_are_held_once(folder: Folder) -> None:
    for attempt in range(1, 60):
        folder.add([failed(row) if attempt < 59 else sample(row) for row in range(20)], attempt, group=20)
    assert folder.out(TINY, folder.path / "scratch") == [(row, sample(row).response) for row in range(20)]


def test_one_row_far_from_the_others_of_its_group(folder: Folder) -> None:
    for start in range(0, 3000, 100):
        late = [max(0, start - 500)] if start else []  # as one that was tried again after all others
        folder.add([sample(row) for row in sorted({*late, *range(start + 1, start + 100)})], group=50)
    assert folder.out(TINY, folder.path / "scratch") == folder.wanted()


def test_nothing_and_a_single_row(folder: Folder) -> None:
    assert folder.out(TINY, folder.path / "scratch") == []
    folder.add([sample(10**12)])
    assert folder.out(TINY, folder.path / "scratch") == folder.wanted()


def test_buckets_hold_the_same_number_of_bytes() -> None:
    even = [Group(start, start + 99, 1000) for start in range(0, 1000, 100)]
    assert list(bucket_starts(even, 2500)) == [0, 250, 500, 750, 1000]
    across = [Group(0, 999, 1000)] * 10
    assert list(bucket_starts(across, 2500)) == [0, 250, 500, 750, 1000]
    assert list(bucket_starts([Group(5, 5, 10**9), Group(7, 7, 10)], 100)) == [0, 6]
    assert list(bucket_starts([], 100)) == [0]


def test_a_part_that_goes_away_is_told(folder: Folder) -> None:
    folder.add([sample(1)])
    folder.parts[0].path.unlink()
    with pytest.raises(BatchvlError, match=r"0\.parquet: cannot be read: No such file"):
        folder.out(TINY, folder.path / "scratch")


MEMORY = """
import asyncio, sys
from pathlib import Path
from batchvl.results import merge
from tests.results.samples import fill, sample

def memory(name):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(name))

out, near, rows = Path(sys.argv[1]), int(sys.argv[2]), 40_000
order = (base + 7919 * row % near for base in range(0, rows, near) for row in range(near))
asyncio.run(fill(out, (sample(row, response="x%d " % row * 700) for row in order), part_rows=3000))
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = memory("VmRSS")
assert merge(out, partial=True).rows == rows
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("near", [pytest.param(5000, marks=pytest.mark.slow), 40_000])
def test_memory_is_for_a_window_not_for_the_rows(near: int, tmp_path: Path) -> None:
    """Out of order within so many rows, as rows that were slow or tried again are, or all over the manifest."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, str(near)], check=True, capture_output=True, text=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert int(done.stdout) < 150_000, f"{done.stdout} kB for 190 MB of rows"
