"""Merge: all shards' parts and journals into one file, in the manifest's order, each row once.

The rows are gone through in windows of about 2 MB. Of each part only the row groups that reach into the window are
read; among several records of a row the winner is: ok before failed, then the later retry, then the lower attempt.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from ..errors import OptionError, ResumeError
from . import parts
from .disk import FAILING, Disk, stopped
from .done import Bitmap
from .formats import writer_for
from .guard import Guard
from .journal import Journal
from .parts import Part
from .record import Counts
from .shard import ShardFolder

RESULTS = "results.parquet"
WINDOW_BYTES = 2 * 2**20
_FIRST_MISSING = 10


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote, and what was not there to write."""

    file: Path
    counts: Counts
    total: int | None
    """The manifest's rows; None where no attempt has got to know them."""
    missing: int
    """Rows below `total` that are not done; 0 where it is not known."""
    first_missing: tuple[int, ...]
    """The first ten of them."""

    @property
    def rows(self) -> int:
        """How many rows the file has."""
        return self.counts.rows

    def __str__(self) -> str:
        text = f"{self.file}: {self.rows:,} rows, {self.counts.ok:,} ok, {self.counts.failures:,} failed"
        if not self.missing:
            return text
        first = ", ".join(map(str, self.first_missing)) + (", …" if self.missing > len(self.first_missing) else "")
        return f"{text}; {self.missing:,} of {self.total:,} are missing: {first}"


class Window(NamedTuple):
    """The rows from low to high, high not included, and the parts that may have some."""

    low: int
    high: int
    parts: list[Part]


def merge(out: Path, file: Path | None = None, total: int | None = None, *, disk: Disk | None = None) -> MergeReport:
    """Merges what is durable in the output folder `out` into one file, whole or not at all; a run may go on meanwhile.

    file: `*.parquet`, `*.jsonl` or `*.jsonl.gz`; OUT/results.parquet where None.
    total: the manifest's rows; by default the most that any attempt knew of.

    Raises ResumeError (no output folder, files too new), OptionError (the file's ending or folder), StoppedEarly (the
    disk) and BatchvlError (a damaged part).
    """
    file, disk = file or out / RESULTS, disk or Disk()
    try:
        guard = Guard.read(out)
    except (FileNotFoundError, NotADirectoryError):
        raise ResumeError(f"{out}: is no output folder of batchvl: it has no run.json") from None
    folders = [folder for folder in ShardFolder.all(out) if folder.shard.count == guard.shards]
    total = _total(guard, folders) if total is None else total
    open_file = writer_for(file)
    try:
        with tempfile.TemporaryDirectory(prefix=".merge-", dir=file.parent) as scratch:
            sources = [part for folder in folders for part in _parts(folder, Path(scratch), guard.schema, disk)]
            done = Bitmap()
            for part in sources:
                done |= part.tally().rows()
            counts = Counts()
            with open_file(file, guard.schema, _metadata(sources), disk) as target:
                for window in windows(sources):
                    table = winners(window, guard.schema)
                    counts.add(_count(table))
                    target.write(table)
                    del table  # before the next one is made
    except OSError as error:
        if error.errno in FAILING:
            raise stopped(file, error) from error
        raise OptionError(f"{file}: cannot be written: {error.strerror or error}") from error
    missing = () if total is None else tuple(islice(done.missing(range(total)), _FIRST_MISSING))
    return MergeReport(file, counts, total, 0 if total is None else total - done.count(range(total)), missing)


def _total(guard: Guard, folders: list[ShardFolder]) -> int | None:
    known = [guard.total]
    for folder in folders:
        known += [attempt.total for attempt in folder.attempts()]
        if complete := folder.complete():
            known.append(complete.total)
    return max((rows for rows in known if rows is not None), default=None)


def _parts(folder: ShardFolder, scratch: Path, schema: pa.Schema, disk: Disk) -> Iterator[Part]:
    """The folder's parts; of a journal without one, a part is made in the folder `scratch`."""
    for number, source in enumerate(folder.sources()):
        if isinstance(source, Journal):
            path = scratch / f"{folder.path.name}-{number}.parquet"
            for _ in parts.write(source, path, schema, {}, disk):
                pass
            yield Part.read(path)
        else:
            yield source


def _metadata(sources: list[Part]) -> dict[str, str]:
    """What the parts say about their run. Where attempts differ (another engine's version), the others are numbered."""
    values: dict[str, list[str]] = {}
    for part in sorted(sources, key=lambda part: part.attempt):
        for name, value in part.metadata.items():
            found = values.setdefault(name, [])
            if value not in found:
                found.append(value)
    return {
        parts.PREFIX + (f"{name}.{number}" if number > 1 else name): value
        for name, found in values.items()
        for number, value in enumerate(found, 1)
    }


def windows(sources: list[Part], size: int = WINDOW_BYTES) -> Iterator[Window]:
    """Cuts the rows into windows that start at a row group's first row, with about `size` bytes of row groups each."""
    groups = sorted((group.low, group.high, group.size, n) for n, part in enumerate(sources) for group in part.groups)
    low = groups[0][0] if groups else 0
    inside: list[tuple[int, int]] = []  # highest row and part of the groups that reach into the window
    at = 0
    while at < len(groups) or inside:
        held = 0
        while at < len(groups) and (held < size or groups[at][0] <= low):
            _, last, length, n = groups[at]
            inside.append((last, n))
            held += length
            at += 1
        high = groups[at][0] if at < len(groups) else max(inside)[0] + 1
        yield Window(low, high, [sources[n] for n in sorted({n for _, n in inside})])
        low, inside = high, [one for one in inside if one[0] >= high]


def winners(window: Window, schema: pa.Schema) -> pa.Table:
    """The window's rows in order, each once."""
    tables = [part.table(window.low, window.high, schema) for part in window.parts]
    keys = [
        pa.table(
            {
                "row": table["row"],
                "failed": pc.equal(table["status"], "failed"),
                "retry": pa.repeat(pa.scalar(-part.retry, pa.int64()), len(table)),
                "attempt": pa.repeat(pa.scalar(part.attempt, pa.int64()), len(table)),
            }
        )
        for table, part in zip(tables, window.parts, strict=True)
    ]
    key = pa.concat_tables(keys)
    order = pc.sort_indices(key, [(name, "ascending") for name in key.column_names])
    row = key["row"].take(order)
    if len(row) > 1:
        first = pc.not_equal(row.slice(1), row.slice(0, len(row) - 1)).combine_chunks()
        order = order.filter(pa.concat_arrays([pa.array([True]), first]))
    table = pa.concat_tables(tables)
    del tables
    table = table.combine_chunks()  # taking from chunks costs far more, and the chunks can go
    return table.take(order)


def _count(table: pa.Table) -> Counts:
    failed = pc.struct_field(table["error"], "code").filter(pc.equal(table["status"], "failed"))
    codes = {pair["values"] or "": pair["counts"] for pair in pc.value_counts(failed).to_pylist()}
    return Counts(len(table) - len(failed), codes)
