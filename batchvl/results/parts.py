"""Parts: immutable Parquet files, each made from one journal segment, sorted by row and renamed into place.

A part's footer holds everything that resuming needs, so that nothing else is read then. Its keys, all with text values:

    batchvl.format     1
    batchvl.attempt    the attempt that wrote it; a lower one takes precedence
    batchvl.retry      1-based number of the attempt's retry, 0 in a run; a later one takes precedence
    batchvl.counts     {"ok": rows, "failed": {code: rows}}
    batchvl.rows       {"ok": row set, "failed": {code: row set}}, by row number in the manifest (see `rowset.py`)
    batchvl.NAME       the run's metadata: version, fingerprint, engine, options
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..errors import BatchvlError, ResumeError
from ..storage.buffered_file import BufferedFile
from ..storage.disk import Disk
from .journal import FORMAT, Entry, Journal
from .record import Counts, decode, to_batch
from .rowset import Outcomes, RowSet

PREFIX = "batchvl."
RESERVED = frozenset({"format", "attempt", "retry", "counts", "rows"})

# A merge loads one row group at a time. A batch bounds how long the writer keeps the GIL from the event loop's thread:
# a few milliseconds.
ROW_BYTES = 300
"""Bytes that a row takes in memory whatever it holds."""
GROUP_ROWS, GROUP_BYTES = 2000, 8 * 2**20
BATCH_ROWS, BATCH_BYTES = 250, 2**20

# Columns with repeated values; for the others, trying a dictionary at each row group would be wasted effort.
DICTIONARY = ["status", "finish_reason", "error.code", "error.stage", "error.message"]


def write(
    journal: Journal,
    path: Path,
    schema: pa.Schema,
    metadata: Mapping[str, str],
    disk: Disk,
    expected: int | None = None,
) -> Iterator[Counts | None]:
    """Convert a segment to a part in steps of a few milliseconds: yield None between steps, finally its counts.

    The part is complete and on the disk before the last yield; if the iterator is closed earlier, nothing remains. A
    row that the segment holds twice is written once: ok before failed, then the first record.

    Args:
        journal: The segment.
        path: The part.
        schema: The output's schema.
        metadata: The run's metadata.
        disk: Writes the part.
        expected: Number of records in the segment, if its writer knows it.

    Raises:
        OSError: the part cannot be written, or the segment has lost records.
    """
    entries: list[Entry] = []
    for number, entry in enumerate(journal.entries()):
        entries.append(entry)
        if number % 4000 == 3999:
            yield None
    if expected is not None and len(entries) != expected:
        raise OSError(errno.EIO, f"only {len(entries)} of {expected} records can be read back from the journal")
    chosen = _dedupe(entries)
    yield None
    outcomes = Outcomes.of((entry.row, entry.code if entry.failed else None) for entry in chosen)
    yield None

    file = BufferedFile(disk, path.with_name(f".{path.name}.tmp"))
    try:
        writer = pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True, use_dictionary=DICTIONARY)
        for group in _slices(chosen, GROUP_ROWS, GROUP_BYTES):
            batches = []
            for batch in _slices(group, BATCH_ROWS, BATCH_BYTES):
                batches.append(to_batch([decode(entry.payload) for entry in batch], schema))
                yield None
            writer.write_table(pa.Table.from_batches(batches), row_group_size=len(group))
            yield None
        writer.add_key_value_metadata(footer(journal, outcomes, metadata))
        writer.close()
        file.publish(path)
    except BaseException:
        file.abandon()
        raise
    yield outcomes.counts()


def footer(journal: Journal, outcomes: Outcomes, metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a part's key-value metadata."""
    rows = {"ok": outcomes.ok.dump(), "failed": {code: rows.dump() for code, rows in outcomes.failed.items()}}
    reserved = {
        "format": str(FORMAT),
        "attempt": str(journal.attempt),
        "retry": str(journal.retry),
        "counts": msgspec.json.encode(msgspec.to_builtins(outcomes.counts())).decode(),
        "rows": msgspec.json.encode(rows).decode(),
    }
    return {PREFIX + name: value for name, value in (dict(metadata) | reserved).items()}


def _dedupe(entries: list[Entry]) -> list[Entry]:
    """Return the entry that takes precedence for each row, by row."""
    best: dict[int, Entry] = {}
    for entry in entries:
        if (known := best.get(entry.row)) is None or (known.failed and not entry.failed):
            best[entry.row] = entry
    return [best[row] for row in sorted(best)]


def _slices(entries: list[Entry], rows: int, size: int) -> Iterator[list[Entry]]:
    """Yield slices of at most this many rows, and of at most this many bytes or one row."""
    start, length = 0, 0
    for at, entry in enumerate(entries):
        if at > start and (at - start >= rows or length + len(entry.payload) > size):
            yield entries[start:at]
            start, length = at, 0
        length += len(entry.payload)
    if start < len(entries):
        yield entries[start:]


class Group(NamedTuple):
    """A row group: its lowest and highest row, and its approximate bytes when decoded."""

    low: int
    high: int
    size: int


class _Rows(msgspec.Struct):
    ok: str
    failed: dict[str, str]


@dataclass(frozen=True)
class Part:
    """The contents of a part's footer."""

    path: Path | str
    """The part's path; a URI if only the footer was read, from an object store."""
    attempt: int
    retry: int
    groups: tuple[Group, ...]
    metadata: dict[str, str]
    """The run's metadata, without the prefix."""
    rows: str
    """The outcomes as JSON: compact, since there may be thousands of parts."""

    @classmethod
    def read(cls, path: Path | str, end: bytes | None = None) -> Part:
        """Read a footer.

        Args:
            path: The part.
            end: The last bytes of a part that is not on a disk, including its whole footer.

        Raises:
            OSError: the file cannot be read.
            ResumeError: it is damaged or has a later format.
        """
        try:
            parquet = pq.read_metadata(path if end is None else pa.BufferReader(end))
            texts = {key.decode(): value.decode() for key, value in (parquet.metadata or {}).items()}
            named = {key.removeprefix(PREFIX): value for key, value in texts.items() if key.startswith(PREFIX)}
            number, attempt, retry = int(named["format"]), int(named["attempt"]), int(named["retry"])
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's error; Arrow's own errors about the contents have no number
            raise ResumeError(damaged(path, error)) from None
        if number > FORMAT:
            raise ResumeError(f"{path}: has format {number}; this version reads up to format {FORMAT}: upgrade batchvl")
        metadata = {name: value for name, value in named.items() if name not in RESERVED}
        return cls(path, attempt, retry, tuple(_groups(parquet)), metadata, named["rows"])

    def outcomes(self) -> Outcomes:
        """Return the part's rows by outcome."""
        try:
            rows = msgspec.json.decode(self.rows, type=_Rows)
            return Outcomes(RowSet.load(rows.ok), {code: RowSet.load(text) for code, text in rows.failed.items()})
        except ValueError as error:
            raise ResumeError(damaged(self.path, error)) from None

    def read_table(self, low: int, high: int, schema: pa.Schema) -> pa.Table:
        """Read the rows from `low` to `high`, exclusive, from the row groups that may hold some.

        Raises:
            OSError: the file cannot be read.
            BatchvlError: it is damaged.
        """
        numbers = [number for number, group in enumerate(self.groups) if group.low < high and group.high >= low]
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True, pre_buffer=False) as file:
                table = file.read_row_groups(numbers, use_threads=False)
            table = table.select(schema.names).cast(schema)
            row = table["row"]
            return table.filter(pc.and_(pc.greater_equal(row, low), pc.less(row, high)))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BatchvlError(damaged(self.path, error)) from error


def damaged(path: Path | str, error: Exception) -> str:
    """Return the error message for a part that cannot be decoded."""
    return f"{path}: damaged ({error}): move it out of the output directory and run again to redo its rows"


def _groups(parquet: pq.FileMetaData) -> Iterator[Group]:
    for number in range(parquet.num_row_groups):
        group = parquet.row_group(number)
        row = group.column(0).statistics
        # Parquet's sizes say little about short rows, which are mostly offsets and nulls in memory.
        yield Group(row.min, row.max, group.total_byte_size + group.num_rows * ROW_BYTES)
