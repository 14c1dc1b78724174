"""Merge: all shards' parts and journals into one file, in the manifest's order, each row once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from ...config.units import Shard
from ...errors import OptionError
from ...manifest import index
from ...storage.disk import FAILING, Disk, as_stopped_early
from ...storage.object_store import RemoteError
from ...storage.scratch import scratch_directory
from .. import parts
from ..journal import Journal
from ..location import open_output
from ..parts import Part
from ..record import Counts
from ..remote import Remote, answering
from ..rowset import RowSet
from ..run_file import RunFile
from ..shard import ShardFolder, total_of
from .formats import ParquetFile, writer_for
from .join import Join
from .report import Gap, MergeReport
from .sort import ordered

RESULTS = "results.parquet"
_FIRST_MISSING = 10


@answering()
def merge(
    out: str | os.PathLike[str] | Remote, file: str | os.PathLike[str] | None = None, total: int | None = None, *,
    partial: bool = False, with_manifest: str | os.PathLike[str] | None = None, disk: Disk | None = None,
) -> MergeReport:  # fmt: skip
    """Merges what is durable in the output folder `out` into one file, whole or not at all; a run may go on meanwhile.

    out: a folder, or an address on an object store: its parts are copied to a disk for the time, and the journals
    that are not uploaded yet are read on their own machine alone.
    file: `*.parquet`, `*.jsonl`, `*.jsonl.gz` or `*.jsonl.zst`; OUT/results.parquet where None.
    total: the manifest's rows; by default what the attempts knew of them.
    partial: also where rows are missing; otherwise nothing is written then, and an older file stays as it is.
    with_manifest: where the run's manifest is, all of whose columns are joined to the rows (see `Join`).

    Raises ResumeError (no output folder, files too new, another manifest), ManifestError (the manifest), OptionError
    (the file's ending or folder), StoppedEarly (the disk) and BatchvlError (a damaged part).

    Example:

        report = batchvl.merge("night", "night.jsonl", with_manifest="night.parquet")
        print(report.rows, "rows,", report.missing, "missing")
    """
    out, disk = open_output(out), disk or Disk()
    here = out if isinstance(out, Path) else out.here()
    target = Path(file) if file is not None else here / RESULTS
    guard = RunFile.read(out)
    folders = ShardFolder.all(out, guard.shards)
    open_file = writer_for(target)
    join = Join(os.fspath(with_manifest), guard, out, _id_columns(folders)) if with_manifest is not None else None
    schema = join.schema if join else guard.schema
    try:
        with scratch_directory(target.parent, ".merge-") as temporary:
            sources, done = _sources(folders, temporary, guard.schema, disk)
            total = _total(here, guard, folders, join) if total is None else total
            report = _report(out, target, guard, folders, done, total)
            if not report.complete and not partial:
                return report
            counts = Counts()
            with open_file(target, temporary / "results", schema, _metadata(sources), disk) as written:
                tables = _counted(ordered(sources, guard.schema, temporary), counts)
                if join:
                    rows = range(next(iter(done), 0), done.stop)
                    tables = join.tables(tables, rows, RowSet.below(done.stop) - done)
                for table in tables:
                    written.write(table)
            if file is None and not isinstance(out, Path):
                report = replace(report, target=out.send(target, RESULTS))
    except RemoteError:
        raise
    except OSError as error:
        if error.errno in FAILING:
            raise as_stopped_early(target, error) from error
        raise OptionError(f"{target}: cannot be written: {error.strerror or error}") from error
    if join:
        json_columns = tuple(join.json_columns) if open_file is ParquetFile else ()
        report = replace(report, json_columns=json_columns, unreadable=join.unreadable)
    return replace(report, written=True, counts=counts)


def _sources(folders: list[ShardFolder], directory: Path, schema: pa.Schema, disk: Disk) -> tuple[list[Part], RowSet]:
    """All parts, and the rows that they have."""
    found, done = [], RowSet()
    known: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for folder in folders:
        for part in _parts(folder, directory, schema, disk):
            done |= part.tally().rows()
            # Of thousands of parts no more is kept than it takes to read them.
            metadata = known.setdefault(tuple(part.metadata.items()), part.metadata)
            found.append(replace(part, rows="", metadata=metadata))
    return found, done


def _parts(folder: ShardFolder, directory: Path, schema: pa.Schema, disk: Disk) -> Iterator[Part]:
    """The folder's parts, on a disk; of a journal without one, a part is made in `directory`."""
    for number, source in enumerate(folder.sources(directory)):
        if isinstance(source, Journal):
            path = directory / f"{folder.path.name}-{number}.parquet"
            for _ in parts.write(source, path, schema, {}, disk):
                pass
            yield Part.read(path)
        else:
            yield source


def _total(out: Path, guard: RunFile, folders: list[ShardFolder], join: Join | None) -> int | None:
    """The manifest's rows, as the attempts knew them, or as somebody has counted them."""
    known, unknown = [guard.total], guard.total is None and not folders
    for folder in folders:
        total, uncounted = total_of(folder.attempts(), folder.complete())
        known.append(total)
        unknown |= uncounted
    if unknown or all(rows is None for rows in known):
        counted = index.read(out, guard.fingerprint)
        counts = (counted.rows if counted else None, join.total if join else None)
        if (rows := next((rows for rows in counts if rows is not None), None)) is None:
            return None
        known.append(rows)
    return max(rows for rows in known if rows is not None)


def _report(
    out: Path | Remote, target: Path, guard: RunFile, folders: list[ShardFolder], done: RowSet, total: int | None
) -> MergeReport:  # fmt: skip
    """What is missing; nothing is written yet."""
    wanted = range(total or 0)
    missing = len(wanted) - done.count(wanted)
    first = tuple(islice(done.missing(wanted), _FIRST_MISSING))
    begun = {folder.shard.index for folder in folders if folder.last_attempt()}
    gaps = []
    for number in range(guard.shards) if missing else ():
        rows = Shard(number, guard.shards).rows(len(wanted))
        if left := len(rows) - done.count(rows):
            gaps.append(Gap(number, number in begun, left))
    return MergeReport(str(out), target, False, Counts(), total, missing, first, guard.shards, tuple(gaps))


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


def _id_columns(folders: Iterable[ShardFolder]) -> set[str]:
    """The manifest's columns that the attempts took ids from."""
    told = [attempt.metadata for folder in folders for attempt in folder.attempts() if attempt.metadata]
    return {metadata.get("id_column", "id") for metadata in told} or {"id"}


def _counted(tables: Iterable[pa.Table], counts: Counts) -> Iterator[pa.Table]:
    for table in tables:
        failed = pc.struct_field(table["error"], "code").filter(pc.equal(table["status"], "failed"))
        codes = {pair["values"] or "": pair["counts"] for pair in pc.value_counts(failed).to_pylist()}
        counts.add(Counts(len(table) - len(failed), codes))
        yield table
