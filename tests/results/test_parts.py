from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchvl.errors import BatchvlError, ResumeError
from batchvl.results import parts
from batchvl.results.journal import Journal, Segment, frame
from batchvl.results.parts import Part
from batchvl.results.record import Counts, Record, encode, schema
from batchvl.storage.disk import Disk

from .samples import failed, sample

SCHEMA = schema("string")


def journal_of(tmp_path: Path, records: list[Record]) -> Journal:
    segment = Segment(tmp_path / "journal", 4, 1, Disk())
    segment.append([frame(encode(record)) for record in records])
    segment.close()
    journal = Journal.read(segment.path)
    segment.path.unlink()
    return journal


def make(tmp_path: Path, records: list[Record], expected: int | None = None) -> Part:
    path = tmp_path / "part.parquet"
    *_, counts = parts.write(journal_of(tmp_path, records), path, SCHEMA, {"engine": "fake"}, Disk(), expected)
    part = Part.read(path)
    assert part.outcomes().counts() == counts
    return part


def test_a_part_is_sorted_and_its_footer_holds_the_outcomes(tmp_path: Path) -> None:
    rows = [7 * number % 5003 for number in range(5003)]
    part = make(tmp_path, [failed(row) if row % 5 == 0 else sample(row) for row in rows], 5003)
    table = pq.read_table(part.path)
    assert table["row"].to_pylist() == sorted(rows)
    assert table.schema.equals(SCHEMA)
    assert table.slice(1, 1).to_pylist()[0]["response"] == sample(1).response
    assert (part.attempt, part.retry, part.metadata) == (4, 1, {"engine": "fake"})
    assert part.outcomes().counts() == Counts(4002, {"missing_file": 1001})
    assert list(part.outcomes().rows()) == sorted(rows)
    assert [(group.low, group.high) for group in part.groups] == [(0, 1999), (2000, 3999), (4000, 5002)]
    assert [path.name for path in tmp_path.iterdir()] == ["part.parquet"]


def test_row_groups_are_bounded_in_bytes(tmp_path: Path) -> None:
    part = make(tmp_path, [sample(row, response="x" * 3_000_000) for row in range(5)])
    assert [(group.low, group.high) for group in part.groups] == [(0, 1), (2, 3), (4, 4)]


def test_a_range_of_rows_is_read(tmp_path: Path) -> None:
    part = make(tmp_path, [sample(row) for row in range(5000)])
    assert part.read_table(1998, 2002, SCHEMA)["row"].to_pylist() == [1998, 1999, 2000, 2001]


def test_a_row_recorded_twice_is_written_once(tmp_path: Path) -> None:
    part = make(tmp_path, [failed(1), sample(2, response="first"), sample(1), sample(2, response="second"), failed(2)])
    assert pq.read_table(part.path).select(["row", "status", "response"]).to_pylist() == [
        {"row": 1, "status": "ok", "response": sample(1).response},
        {"row": 2, "status": "ok", "response": "first"},
    ]


def test_a_journal_that_lost_records_is_not_converted(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="only 1 of 2"):
        make(tmp_path, [sample(0)], expected=2)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_reported(tmp_path: Path) -> None:
    part = make(tmp_path, [sample(row) for row in range(100)])
    data = part.path.read_bytes()
    part.path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
    with pytest.raises(BatchvlError, match=r"part.parquet: damaged .*move it"):
        part.read_table(0, 100, SCHEMA)
    part.path.write_bytes(data[:-100])
    with pytest.raises(ResumeError, match=r"part.parquet: damaged .*move it"):
        Part.read(part.path)


def test_a_later_format_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "FORMAT", 2)
    path = tmp_path / "part.parquet"
    for _ in parts.write(journal_of(tmp_path, [sample(0)]), path, SCHEMA, {}, Disk()):
        pass
    monkeypatch.setattr(parts, "FORMAT", 1)
    with pytest.raises(ResumeError, match="has format 2"):
        Part.read(path)
