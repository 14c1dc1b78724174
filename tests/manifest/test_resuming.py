"""A resumed run reads the remaining rows only: by row groups in Parquet, by the index in text."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchvl.manifest import index
from batchvl.manifest.readers import text
from batchvl.results.rowset import RowSet
from batchvl.types import Row
from tests.manifest.test_streaming import FORMATS, big, bytes_read
from tests.manifest.writing import numbers, opened, write

REMAINING = [0, 255, 256, *range(300, 310), 1999, 2499]


@pytest.fixture(autouse=True)
def _index_is_written_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "WRITE_INDEX_ROWS", 1000)
    monkeypatch.setattr(text, "STEP", 100)
    monkeypatch.setattr(index, "STEP", 100)


def done_except(remaining: list[int], rows: int) -> RowSet:
    done = RowSet.below(rows)
    done -= RowSet(remaining)
    return done


def remaining_rows(path: Path, done: RowSet, out: Path | None = None) -> list[Row]:
    return [row for rows in opened(path).rows(skip=done, index_directory=out) for row in rows]


def read_through(path: Path, out: Path) -> str:
    """Read all rows, so that there is an index, and return the manifest's fingerprint."""
    manifest = opened(path)
    assert sum(map(len, manifest.rows(index_directory=out))) == manifest.total
    return manifest.fingerprint


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("indexed", [False, True])
def test_the_remaining_rows_are_read(tmp_path: Path, name: str, indexed: bool) -> None:
    path, out = big(tmp_path / "manifest" / name), tmp_path / "out"
    if indexed:
        read_through(path, out)
    rows = remaining_rows(path, done_except(REMAINING, 2500), out)
    assert [(row.number, row.prompt) for row in rows] == [(number, f"a\nb {number}") for number in REMAINING]
    assert remaining_rows(path, RowSet.below(2500), out) == []


@pytest.mark.parametrize("name", ["m.jsonl", "m.csv"])
def test_done_rows_are_not_read(tmp_path: Path, name: str) -> None:
    path, out = big(tmp_path / "manifest" / name), tmp_path / "out"
    index_read = index.read(out, read_through(path, out))
    assert index_read is not None
    manifest = opened(path)
    data = bytearray(path.read_bytes())
    for start, stop in ((100, 800), (900, 2000)):  # blank lines are not rows
        begin, end = (index_read.seek(row)[2].offset for row in (start, stop))
        data[begin:end] = b"\n" * (end - begin)
    path.write_bytes(data)
    remaining = [7, 850, 851, 2350]
    rows = [row for rows in manifest.rows(skip=done_except(remaining, 2500), index_directory=out) for row in rows]
    assert [(row.number, row.prompt) for row in rows] == [(number, f"a\nb {number}") for number in remaining]
    assert len(remaining_rows(path, RowSet())) == 700


def test_the_index_grows_as_the_manifest_is_read(tmp_path: Path) -> None:
    path, out = big(tmp_path / "m.jsonl", 5000), tmp_path / "out"
    manifest = opened(path)
    chunks = manifest.rows(index_directory=out)
    assert sum(map(len, islice(chunks, 9))) == 2304
    chunks.close()  # type: ignore[attr-defined]  # as if the run stopped here
    index_read = index.read(out, manifest.fingerprint)
    assert index_read is not None
    assert index_read.rows is None
    assert index_read.seek(1950)[:2] == (0, 1900)
    assert index_read.seek(4000)[:2] == (0, 2000)
    # The next run continues from there and reads to the end. The one after that knows the number of rows.
    assert numbers(remaining_rows(path, done_except([], 2300), out)) == list(range(2300, 5000))
    later = opened(path)
    rows = later.rows(skip=RowSet.below(4999), index_directory=out)
    assert later.total == 5000
    assert numbers(next(rows)) == [4999]


def test_a_short_manifest_needs_no_index(tmp_path: Path) -> None:
    read_through(big(tmp_path / "m.jsonl", 900), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_index_that_cannot_be_written_is_not_required(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file in place of the directory")
    read_through(big(tmp_path / "m.jsonl"), tmp_path / "out")


def test_done_files_are_not_opened(tmp_path: Path) -> None:
    names = ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.jsonl")
    for at, name in enumerate(names):
        write(tmp_path / "m" / name, [{"prompt": f"{at} {number}"} for number in range(1100 + at)])
    fingerprint = read_through(tmp_path / "m", tmp_path / "out")
    manifest = opened(tmp_path / "m")
    manifest.fingerprint = fingerprint
    for name in names[:2]:
        (tmp_path / "m" / name).unlink()
    remaining = [2201, 2300, 3302, 3303, 4405]
    rows = [
        row
        for rows in manifest.rows(skip=done_except(remaining, 4406), index_directory=tmp_path / "out")
        for row in rows
    ]
    assert [(row.number, row.prompt) for row in rows] == [
        (2201, "2 0"),
        (2300, "2 99"),
        (3302, "2 1101"),
        (3303, "3 0"),
        (4405, "3 1102"),
    ]


@pytest.mark.parametrize("name", ["m.jsonl", "m.parquet"])
def test_a_row_does_not_wait_for_one_that_is_far_away(tmp_path: Path, name: str) -> None:
    path = big(tmp_path / name, 20_000)
    chunks = opened(path).rows(skip=done_except([3, 4, 10_000], 20_000))
    assert [numbers(chunk) for chunk in chunks] == [[3, 4], [10_000]]


def test_done_row_groups_are_not_read(tmp_path: Path) -> None:
    rows = [{"prompt": os.urandom(1000).hex()} for _ in range(4000)]
    path = write(tmp_path / "m.parquet", rows, row_group_size=1000, compression="none", use_dictionary=False)
    assert pq.read_metadata(path).num_row_groups == 4
    before = bytes_read()
    assert [row.prompt for row in remaining_rows(path, done_except([3700], 4000))] == [rows[3700]["prompt"]]
    assert bytes_read() - before < path.stat().st_size / 2
