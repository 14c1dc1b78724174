"""Merge the parts and journals of all shards into one file, in the manifest's order, each row once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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
from ..output import Storage
from ..parts import Part
from ..record import Counts
from ..remote import stop_on_remote_error
from ..rowset import RowSet
from ..run_file import RunFile
from ..shard import ShardDirectory, manifest_total
from .formats import ParquetFile, writer_for
from .join import Join
from .report import Gap, MergeReport
from .sort import read_sorted

RESULTS = "results.parquet"
_FIRST_MISSING = 10


@stop_on_remote_error()
def merge(
    out: str | os.PathLike[str] | Storage,
    file: str | os.PathLike[str] | None = None,
    total: int | None = None,
    *,
    partial: bool = False,
    with_manifest: str | os.PathLike[str] | None = None,
    disk: Disk | None = None,
) -> MergeReport:
    """Merge all durable rows of an output into one file, whole or not at all. Safe while runners are active.

    Args:
        out: The output directory, or a URI on an object store. Parts on an object store are copied to a disk
            temporarily; journals that are not uploaded yet are read only on the machine that wrote them.
        file: `*.parquet`, `*.jsonl`, `*.jsonl.gz` or `*.jsonl.zst`; by default OUT/results.parquet.
        total: Number of rows in the manifest; by default as the attempts knew it.
        partial: Write the file even if rows are missing. Otherwise nothing is written then, and an older file is kept.
        with_manifest: Path of the run's manifest; all its columns are joined to the rows (see `Join`).

    Returns:
        A report of what was written and which rows are missing.

    Raises:
        ResumeError: `out` is not an output, a file has a later format, or the manifest is another one.
        ManifestError: the manifest cannot be read.
        OptionError: the file's extension is unknown or its directory cannot be written.
        StoppedEarly: the disk is full or failing, or the object store does not respond.
        BatchvlError: a part is damaged.

    Example:

        report = batchvl.merge("night", "night.jsonl", with_manifest="night.parquet")
        print(report.rows, "rows,", report.missing, "missing")
    """
    storage, disk = open_output(out), disk or Disk()
    directory = storage.make_path()
    target = Path(file) if file is not None else directory / RESULTS
    run_file = storage.run_file()
    shards = storage.shards(run_file.shards)
    table_file = writer_for(target)
    join = None
    if with_manifest is not None:
        join = Join(os.fspath(with_manifest), run_file, storage, _id_columns(shards))
    with _translate_disk_errors(target), scratch_directory(target.parent, ".merge-") as scratch:
        sources, done = _read_sources(shards, scratch, run_file.schema, disk)
        if total is None:
            total = _manifest_total(directory, run_file, shards, join)
        report = _report(storage, target, run_file, shards, done, total)
        if not report.complete and not partial:
            return report
        counts = Counts()
        tables = _count_rows(read_sorted(sources, run_file.schema, scratch), counts)
        if join:
            rows = range(next(iter(done), 0), done.stop)
            tables = join.tables(tables, rows, RowSet.below(done.stop) - done)
        schema = join.schema if join else run_file.schema
        with table_file(target, scratch / "results", schema, _metadata(sources), disk) as merged:
            for table in tables:
                merged.write(table)
        if file is None:
            report = replace(report, target=storage.publish(target, RESULTS))
    if join:
        json_columns = tuple(join.json_columns) if table_file is ParquetFile else ()
        report = replace(report, json_columns=json_columns, unreadable=join.unreadable)
    return replace(report, written=True, counts=counts)


@contextmanager
def _translate_disk_errors(target: Path) -> Iterator[None]:
    """Raise StoppedEarly for a failing disk and OptionError for a target that cannot be written."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        if error.errno in FAILING:
            raise as_stopped_early(target, error) from error
        raise OptionError(f"{target}: cannot be written: {error.strerror or error}") from error


def _read_sources(
    shards: list[ShardDirectory], scratch: Path, schema: pa.Schema, disk: Disk
) -> tuple[list[Part], RowSet]:
    """Return all parts, and the rows that they hold."""
    sources, done = [], RowSet()
    known: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
    for shard in shards:
        for part in _read_parts(shard, scratch, schema, disk):
            done |= part.outcomes().rows()
            # There may be thousands of parts: keep only what it takes to read them, and share equal metadata.
            metadata = known.setdefault(tuple(part.metadata.items()), part.metadata)
            sources.append(replace(part, rows="", metadata=metadata))
    return sources, done


def _read_parts(shard: ShardDirectory, scratch: Path, schema: pa.Schema, disk: Disk) -> Iterator[Part]:
    """Yield the shard's parts, all on a disk; a journal without a part is converted in the scratch directory."""
    for number, source in enumerate(shard.sources(scratch)):
        if isinstance(source, Journal):
            path = scratch / f"{shard.path.name}-{number}.parquet"
            for _ in parts.write(source, path, schema, {}, disk):
                pass
            yield Part.read(path)
        else:
            yield source


def _manifest_total(directory: Path, run_file: RunFile, shards: list[ShardDirectory], join: Join | None) -> int | None:
    """Return the number of rows in the manifest from the attempts' files, else from the index or the manifest."""
    known, in_doubt = [run_file.total], run_file.total is None and not shards
    for shard in shards:
        total, uncounted = manifest_total(shard.attempts(), shard.complete())
        known.append(total)
        in_doubt |= uncounted
    if in_doubt or all(rows is None for rows in known):
        manifest_index = index.read(directory, run_file.fingerprint)
        counts = (manifest_index.rows if manifest_index else None, join.total if join else None)
        if (counted := next((rows for rows in counts if rows is not None), None)) is None:
            return None
        known.append(counted)
    return max(rows for rows in known if rows is not None)


def _report(
    storage: Storage, target: Path, run_file: RunFile, shards: list[ShardDirectory], done: RowSet, total: int | None
) -> MergeReport:
    """Return which rows are missing, before anything is written."""
    all_rows = range(total or 0)
    missing = len(all_rows) - done.count(all_rows)
    first_missing = tuple(islice(done.missing(all_rows), _FIRST_MISSING))
    begun = {shard.shard.index for shard in shards if shard.last_attempt()}
    gaps = []
    for number in range(run_file.shards) if missing else ():
        rows = Shard(number, run_file.shards).rows(len(all_rows))
        if shard_missing := len(rows) - done.count(rows):
            gaps.append(Gap(number, number in begun, shard_missing))
    return MergeReport(
        str(storage), target, False, Counts(), total, missing, first_missing, run_file.shards, tuple(gaps)
    )


def _metadata(sources: list[Part]) -> dict[str, str]:
    """Return the parts' metadata. Values that differ between attempts (another engine version) get numbered names."""
    values: dict[str, list[str]] = {}
    for part in sorted(sources, key=lambda part: part.attempt):
        for name, value in part.metadata.items():
            known = values.setdefault(name, [])
            if value not in known:
                known.append(value)
    return {
        parts.PREFIX + (f"{name}.{number}" if number > 1 else name): value
        for name, known in values.items()
        for number, value in enumerate(known, 1)
    }


def _id_columns(shards: Iterable[ShardDirectory]) -> set[str]:
    """Return the manifest's columns that the attempts took ids from."""
    described = [attempt.metadata for shard in shards for attempt in shard.attempts() if attempt.metadata]
    return {metadata.get("id_column", "id") for metadata in described} or {"id"}


def _count_rows(tables: Iterable[pa.Table], counts: Counts) -> Iterator[pa.Table]:
    """Yield the tables and add their rows to the counts."""
    for table in tables:
        failed = pc.struct_field(table["error"], "code").filter(pc.equal(table["status"], "failed"))
        codes = {pair["values"] or "": pair["counts"] for pair in pc.value_counts(failed).to_pylist()}
        counts.add(Counts(len(table) - len(failed), codes))
        yield table
