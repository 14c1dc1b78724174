import os
from pathlib import Path

import pytest

from batchvl.errors import ResumeError
from batchvl.results.journal import Journal, Segment, Tail, frame
from batchvl.results.record import decode, encode
from batchvl.storage.disk import Disk

from .samples import failed, sample

RECORDS = [sample(3), failed(1), sample(2, response="é" * 50)]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # these tests read a file hundreds of times
    path = tmp_path / "journal-0007-000001.log"
    segment = Segment(path, attempt=7, retry=2, disk=Disk())
    segment.append([frame(encode(record)) for record in RECORDS])
    segment.close()
    assert (segment.rows, segment.size) == (3, path.stat().st_size)
    return path


def rows(path: Path) -> list[int]:
    return [entry.row for entry in Journal.read(path).entries()]


def test_records_are_read_back(path: Path) -> None:
    journal = Journal.read(path)
    assert (journal.attempt, journal.retry) == (7, 2)
    entries = list(journal.entries())
    assert [decode(entry.payload) for entry in entries] == RECORDS
    assert [(e.row, e.failed, e.code) for e in entries] == [(3, False, ""), (1, True, "missing_file"), (2, False, "")]
    assert list(journal.outcomes().failed["missing_file"]) == [1]


def test_a_segment_torn_at_any_byte(path: Path) -> None:
    data = path.read_bytes()
    sizes = [len(frame(encode(record))) for record in RECORDS]
    ends = [len(data) - sizes[1] - sizes[2], len(data) - sizes[2], len(data)]
    for cut in [*range(30), *range(len(data) - sizes[1] - sizes[2] - 10, len(data))]:
        path.write_bytes(data[:cut])
        assert rows(path) == [record.row for record, end in zip(RECORDS, ends, strict=True) if end <= cut], cut


def test_a_tail_reads_each_record_once_whatever_the_chunks(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(b"")
    tail = Tail(path)
    for end in range(len(data) + 1):
        with path.open("ab") as file:
            file.write(data[end - 1 : end] if end else b"")
        tail.follow()
        assert tail.outcomes.rows() == Journal.read(path).outcomes().rows(), end
    assert (tail.attempt, tail.retry) == (7, 2)
    assert (list(tail.outcomes.ok), list(tail.outcomes.failed["missing_file"])) == ([2, 3], [1])
    path.unlink()
    with pytest.raises(FileNotFoundError):
        tail.follow()


def test_a_flipped_bit_anywhere_in_the_last_two_frames(path: Path) -> None:
    data = path.read_bytes()
    sizes = [len(frame(encode(record))) for record in RECORDS]
    for at in range(len(data) - sizes[1] - sizes[2], len(data)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        assert rows(path) == ([3, 1] if at >= len(data) - sizes[2] else [3]), at


@pytest.mark.parametrize("tail", [bytes(4096), b"\0" * 7, b"\xff" * 100])
def test_a_segment_whose_end_was_never_written(path: Path, tail: bytes) -> None:
    path.write_bytes(path.read_bytes() + tail)
    assert rows(path) == [3, 1, 2]


def test_a_header_that_was_never_written(path: Path) -> None:
    path.write_bytes(bytes(4096))
    assert rows(path) == []


def test_a_later_format_and_other_files_are_rejected(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"\x02\0\0\0" + data[12:])
    with pytest.raises(ResumeError, match="has format 2; this version reads up to format 1"):
        Journal.read(path)
    path.write_bytes(b"something else " * 10)
    with pytest.raises(ResumeError, match="not a batchvl journal"):
        Journal.read(path)


def test_the_writer_notices_a_deleted_journal(tmp_path: Path) -> None:
    segment = Segment(tmp_path / "j", 1, 0, Disk())
    (tmp_path / "j").unlink()
    with pytest.raises(FileNotFoundError, match="deleted"):
        segment.append([frame(encode(sample(0)))])
    segment.close()
