"""Parts: immutable Parquet files, each made of one journal segment, sorted by row, renamed into place.

A part's footer tells what resume needs, so that resume reads nothing else. Its keys, all texts:

    batchvl.format     1
    batchvl.attempt    the attempt that wrote it; a lower one wins
    batchvl.retry      0, or the how-manieth `retry` of the run the attempt belonged to; a later one wins
    batchvl.counts     {"ok": rows, "failed": {code: rows}}
    batchvl.rows       {"ok": bitmap, "failed": {code: bitmap}}, rows counted from the manifest's first (see `done.py`)
    batchvl.NAME       whatever the run says about itself: version, fingerprint, engine, options
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
OWN = frozenset({"format", "attempt", "retry", "counts", "rows"})

# A row group is what merge reads at a time; a batch is for how long the writer keeps the event loop's thread from the
# interpreter: a few milliseconds.
ROW_BYTES = 300
"""What a row takes in memory whatever it holds."""
GROUP_ROWS, GROUP_BYTES = 2000, 8 * 2**20
BATCH_ROWS, BATCH_BYTES = 250, 2**20

# Columns whose values repeat; for the others a dictionary is tried in vain at each row group.
DICTIONARY = ["status", "finish_reason", "error.code", "error.stage", "error.message"]


def write(
    journal: Journal, path: Path, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk,
    expected: int | None = None,
) -> Iterator[Counts | None]:  # fmt: skip
    """Makes a part of a segment, step by step: yields None between steps of a few milliseconds, at last its counts.

    The part is in its place, on the disk, before the last yield; left early, nothing but a temporary file remains.
    A row that the segment holds twice is written once, ok before failed, the first before the later.
    expected: how many records the segment must have, since its writer wrote so many.
    Raises OSError.
    """
    entries: list[Entry] = []
    for number, entry in enumerate(journal.entries()):
        entries.append(entry)
        if number % 4000 == 3999:
            yield None
    if expected is not None and len(entries) != expected:
        raise OSError(errno.EIO, f"only {len(entries)} of {expected} records in the journal can be read back")
    best = _winners(entries)
    yield None
    tally = Outcomes.of((entry.row, entry.code if entry.failed else None) for entry in best)
    yield None

    temporary = path.with_name(f".{path.name}.tmp")
    sink = BufferedFile(disk, temporary)
    try:
        writer = pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True, use_dictionary=DICTIONARY)
        for group in _slices(best, GROUP_ROWS, GROUP_BYTES):
            batches = []
            for some in _slices(group, BATCH_ROWS, BATCH_BYTES):
                batches.append(to_batch([decode(entry.payload) for entry in some], schema))
                yield None
            writer.write_table(pa.Table.from_batches(batches), row_group_size=len(group))
            yield None
        writer.add_key_value_metadata(footer(journal, tally, metadata))
        writer.close()
        sink.finish()
        disk.rename(temporary, path)
    except BaseException:
        sink.abandon()
        disk.discard(temporary)
        raise
    disk.sync_folder(path.parent)
    yield tally.counts()


def footer(journal: Journal, tally: Outcomes, metadata: Mapping[str, str]) -> dict[str, str]:
    """A part's key-value metadata."""
    rows = {"ok": tally.ok.dump(), "failed": {code: found.dump() for code, found in tally.failed.items()}}
    own = {
        "format": str(FORMAT),
        "attempt": str(journal.attempt),
        "retry": str(journal.retry),
        "counts": msgspec.json.encode(msgspec.to_builtins(tally.counts())).decode(),
        "rows": msgspec.json.encode(rows).decode(),
    }
    return {PREFIX + name: value for name, value in (dict(metadata) | own).items()}


def _winners(entries: list[Entry]) -> list[Entry]:
    best: dict[int, Entry] = {}
    for entry in entries:
        if (known := best.get(entry.row)) is None or (known.failed and not entry.failed):
            best[entry.row] = entry
    return [best[row] for row in sorted(best)]


def _slices(entries: list[Entry], rows: int, size: int) -> Iterator[list[Entry]]:
    start, held = 0, 0
    for at, entry in enumerate(entries):
        if at > start and (at - start >= rows or held + len(entry.payload) > size):
            yield entries[start:at]
            start, held = at, 0
        held += len(entry.payload)
    if start < len(entries):
        yield entries[start:]


class Group(NamedTuple):
    """A row group: its lowest and highest row, and its bytes when decoded, about."""

    low: int
    high: int
    size: int


class _Rows(msgspec.Struct):
    ok: str
    failed: dict[str, str]


@dataclass(frozen=True)
class Part:
    """What a part's footer tells."""

    path: Path | str
    """A str where only the footer was read, of a file that is not on a disk."""
    attempt: int
    retry: int
    groups: tuple[Group, ...]
    metadata: dict[str, str]
    """What the run said about itself, without the prefix."""
    rows: str
    """The tally as JSON: a part among thousands is kept small."""

    @classmethod
    def read(cls, path: Path | str, end: bytes | None = None) -> Part:
        """Reads the footer. Raises OSError, and ResumeError where the file is damaged or of a later format.

        end: the file's last bytes, with all of the footer, where it is not on a disk.
        """
        try:
            found = pq.read_metadata(path if end is None else pa.BufferReader(end))
            texts = {key.decode(): value.decode() for key, value in (found.metadata or {}).items()}
            own = {key.removeprefix(PREFIX): value for key, value in texts.items() if key.startswith(PREFIX)}
            number, attempt, retry = int(own["format"]), int(own["attempt"]), int(own["retry"])
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the system's; without a number it is Arrow's, about what it read
            raise ResumeError(damaged(path, error)) from None
        if number > FORMAT:
            raise ResumeError(f"{path}: has format {number}; this batchvl reads up to {FORMAT}: use a later version")
        return cls(
            path, attempt, retry, tuple(_groups(found)), {k: v for k, v in own.items() if k not in OWN}, own["rows"]
        )

    def tally(self) -> Outcomes:
        """The part's rows, by result."""
        try:
            rows = msgspec.json.decode(self.rows, type=_Rows)
            return Outcomes(RowSet.load(rows.ok), {code: RowSet.load(text) for code, text in rows.failed.items()})
        except ValueError as error:
            raise ResumeError(damaged(self.path, error)) from None

    def table(self, low: int, high: int, schema: pa.Schema) -> pa.Table:
        """The rows from low to high, high not included, read from the row groups that may have some.

        Raises OSError, and BatchvlError where the file is damaged.
        """
        wanted = [number for number, group in enumerate(self.groups) if group.low < high and group.high >= low]
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True, pre_buffer=False) as file:
                table = file.read_row_groups(wanted, use_threads=False)
            table = table.select(schema.names).cast(schema)
            row = table["row"]
            return table.filter(pc.and_(pc.greater_equal(row, low), pc.less(row, high)))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BatchvlError(damaged(self.path, error)) from error


def damaged(path: Path | str, error: Exception) -> str:
    """What to tell about a part that cannot be read."""
    return f"{path}: damaged ({error}): move it out of the output folder and run again to answer its rows once more"


def _groups(found: pq.FileMetaData) -> Iterator[Group]:
    for number in range(found.num_row_groups):
        group = found.row_group(number)
        row = group.column(0).statistics
        # Parquet's bytes tell little of short rows, whose columns are mostly offsets and nulls in memory.
        yield Group(row.min, row.max, group.total_byte_size + group.num_rows * ROW_BYTES)
