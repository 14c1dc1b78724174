"""Parts in any order are read in the manifest's order, each row once, whatever is spilled."""

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


class Parts:
    """Parts with few rows per group, and the result that takes precedence for each row."""

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
        outcomes = Outcomes()
        for record in records:
            outcomes.add(record.row, record.error.code if record.error else None)
        with pq.ParquetWriter(path, SCHEMA, write_page_checksum=True) as writer:
            writer.write_table(pa.Table.from_batches([to_batch(records, SCHEMA)]), row_group_size=group)
            writer.add_key_value_metadata(parts.footer(Journal(attempt, retry, b""), outcomes, {}))
        self.parts.append(Part.read(path))

    def read(self, limits: Limits, scratch: Path) -> list[tuple[int, str | None]]:
        """Return the sorted rows; check that tables are small and that no file is left."""
        rows = []
        for table in read_sorted(self.parts, SCHEMA, scratch, limits):
            assert table.schema == SCHEMA
            assert 0 < table.nbytes < 6 * limits.window
            rows += zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True)
        assert os.listdir(scratch) == []
        return rows

    def expected(self) -> list[tuple[int, str | None]]:
        return [(row, response) for row, (_, response) in sorted(self.best.items())]


@pytest.fixture
def parts_written(tmp_path: Path) -> Parts:
    (tmp_path / "scratch").mkdir()
    return Parts(tmp_path)


def cut(rows: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


@pytest.mark.parametrize("seed", range(3))
def test_rows_anywhere_in_several_parts(parts_written: Parts, seed: int) -> None:
    draw = random.Random(seed)
    spilled = 0
    for attempt, retry in ((1, 0), (2, 0), (3, 1), (4, 2)):
        rows = draw.sample(range(250), draw.randint(50, 200))
        for chunk in cut(rows, draw.randint(10, 60)):
            records = [
                sample(row, response=f"{attempt}" * draw.randint(0, 300)) if draw.random() < 0.7 else failed(row)
                for row in chunk
            ]
            parts_written.add(records, attempt, retry, group=draw.randint(1, 20))
    scratch = parts_written.path / "scratch"
    rows_read = []
    for table in read_sorted(parts_written.parts, SCHEMA, scratch, TINY):
        rows_read += zip(table["row"].to_pylist(), table["response"].to_pylist(), strict=True)
        spilled = max(spilled, len(os.listdir(scratch)))
    assert rows_read == parts_written.expected()
    assert spilled > 5, "rows were spilled"
    assert parts_written.read(Limits(), scratch) == parts_written.expected(), "the same without spilling"


def test_rows_in_roughly_the_manifests_order_are_not_spilled(parts_written: Parts) -> None:
    rows = list(range(600))
    for start in range(0, 600, 20):
        rows[start : start + 20] = reversed(rows[start : start + 20])
    for chunk in cut(rows, 30):
        parts_written.add([sample(row) for row in chunk])
    scratch = parts_written.path / "scratch"
    scratch.rmdir()  # no file can be written
    tables = list(read_sorted(parts_written.parts, SCHEMA, scratch, TINY))
    assert [row for table in tables for row in table["row"].to_pylist()] == list(range(600))
    assert len(tables) > 20


def test_rows_of_many_attempts_are_held_once(parts_written: Parts) -> None:
    for attempt in range(1, 60):
        parts_written.add([failed(row) if attempt < 59 else sample(row) for row in range(20)], attempt, group=20)
    assert parts_written.read(TINY, parts_written.path / "scratch") == [
        (row, sample(row).response) for row in range(20)
    ]


def test_a_row_far_from_the_others_of_its_group(parts_written: Parts) -> None:
    for start in range(0, 3000, 100):
        late = [max(0, start - 500)] if start else []  # like a row that was retried after all others
        parts_written.add([sample(row) for row in sorted({*late, *range(start + 1, start + 100)})], group=50)
    assert parts_written.read(TINY, parts_written.path / "scratch") == parts_written.expected()


def test_no_row_and_a_single_row(parts_written: Parts) -> None:
    assert parts_written.read(TINY, parts_written.path / "scratch") == []
    parts_written.add([sample(10**12)])
    assert parts_written.read(TINY, parts_written.path / "scratch") == parts_written.expected()


def test_buckets_have_about_the_same_size() -> None:
    even = [Group(start, start + 99, 1000) for start in range(0, 1000, 100)]
    assert list(bucket_starts(even, 2500)) == [0, 250, 500, 750, 1000]
    across = [Group(0, 999, 1000)] * 10
    assert list(bucket_starts(across, 2500)) == [0, 250, 500, 750, 1000]
    assert list(bucket_starts([Group(5, 5, 10**9), Group(7, 7, 10)], 100)) == [0, 6]
    assert list(bucket_starts([], 100)) == [0]


def test_a_missing_part_is_reported(parts_written: Parts) -> None:
    parts_written.add([sample(1)])
    parts_written.parts[0].path.unlink()
    with pytest.raises(BatchvlError, match=r"0\.parquet: cannot be read: No such file"):
        parts_written.read(TINY, parts_written.path / "scratch")


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
def test_memory_is_bounded(near: int, tmp_path: Path) -> None:
    """Rows are out of order within a range, like slow or retried rows, or across the whole manifest."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path, str(near)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert int(done.stdout) < 150_000, f"{done.stdout} kB for 190 MB of rows"
