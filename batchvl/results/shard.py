"""A shard's directory: its files, and the operations of an attempt (`attempt.py`) on them.

    OUT/run.json                         identifies the run: see `run_file.py`
    OUT/shard-00000-of-00001/
        lock                             held by the runner that works on this shard
        attempt-0001.json                who made the attempt, when, with what; created exclusively
        journal-0001-000001.log          attempt 1's first segment, until a part holds its records
        part-0001-000001.parquet         the part made from it; if both exist, only the part counts
        complete.json                    exists once an attempt has reached the end of the shard
    OUT/results.parquet                  all shards merged
    OUT/summary.json                     the last run's summary

Every attempt writes files with names of its own and only reads those of other attempts, so attempts that do not see
each other (two hosts, a file system without locks) cannot harm each other. Files of a dead attempt remain: journals are
read; names that start with a dot are temporary and ignored.

On an object store the layout is the same; `remote.py` describes the differences.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from ..config.units import Shard
from ..storage.disk import Disk
from .journal import Journal
from .lock import Holder, read_holder
from .parts import Part
from .rowset import Outcomes, RowSet

_ATTEMPT = re.compile(r"(?:attempt|journal|part)-(\d+)[.-].*")
JOURNAL = re.compile(r"journal-(\d+)-(\d+)\.log")
PART = re.compile(r"part-(\d+)-(\d+)\.parquet")

SegmentKey = tuple[int, int]
"""Attempt and segment number, shared by a segment and its part."""


class AttemptFile(msgspec.Struct, omit_defaults=True):
    """The contents of `attempt-0001.json`."""

    format: int
    attempt: int
    retry: int
    host: str
    pid: int
    since: str
    versions: dict[str, str]
    total: int | None = None
    """Number of rows in the manifest, limited by `--limit`; None while the attempt does not know it."""
    codes: list[str] | None = None
    """Error codes that a retry selects; None selects all failures. Ignored if `retry` is 0."""
    ended: bool = False
    """Whether a retry is finished, so that the next one gets a new number."""
    metadata: dict[str, str] = {}
    """The run's description: EngineInfo and others."""
    up: float | None = None
    """When the engine was up and the run described itself, in seconds since the epoch."""


class CompleteFile(msgspec.Struct):
    """The contents of `complete.json`."""

    format: int
    total: int | None
    """Number of rows in the manifest, all shards together."""


class FileStat(NamedTuple):
    """The properties that change whenever a file does."""

    time: float
    """Time of the last write by the file system's clock, in seconds since the epoch."""
    size: int


@dataclass(frozen=True)
class ShardDirectory:
    """A shard's directory with the files of all attempts; this class is the implementation for a disk."""

    path: Path
    """The directory on a disk: of a local output all files, of a remote one only journals, lock and logs."""
    shard: Shard

    def journal(self, key: SegmentKey) -> Path:
        """Return the path of a segment."""
        return self.path / f"journal-{key[0]:04d}-{key[1]:06d}.log"

    def part(self, key: SegmentKey) -> Path:
        """Return the path of a segment's part."""
        return self.path / f"part-{key[0]:04d}-{key[1]:06d}.parquet"

    def keys(self) -> tuple[set[SegmentKey], set[SegmentKey]]:
        """Return the journals without a part, and the parts. Some of these journals may have become parts meanwhile."""
        journals = parse_keys(JOURNAL, self.local_names())  # first: a journal is removed only once its part exists
        parts = parse_keys(PART, self.names())
        return journals - parts, parts

    def sources(self, scratch: Path | None = None) -> Iterator[Part | Journal]:
        """Yield everything that holds records: journals without a part, then parts. Safe while runners are active.

        Args:
            scratch: A directory for copies of remote parts, to read their rows; by default only footers are read.

        Raises:
            OSError: a file cannot be read.
            ResumeError: a file is damaged or has a later format.
        """
        journals, parts = self.keys()
        for key in sorted(journals):
            try:
                yield Journal.read(self.journal(key))
            except FileNotFoundError:
                parts.add(key)
        for _, read in self.part_readers(sorted(parts), scratch):
            yield read()

    def part_readers(
        self, keys: Iterable[SegmentKey], scratch: Path | None = None
    ) -> Iterator[tuple[SegmentKey, Callable[[], Part]]]:
        """Yield for each part a function that reads it and raises what `Part.read` raises.

        Args:
            keys: The parts.
            scratch: See `sources`.
        """
        for key in keys:
            yield key, partial(Part.read, self.part(key))

    def recover(self) -> Recovered:
        """Read the outcomes of all attempts so far. Raises what `sources` raises."""
        recovered = Recovered()
        for source in self.sources():
            # Keep a journal's outcomes only: its records are large.
            rows = source if isinstance(source, Part) else source.outcomes()
            recovered.sources.append((-source.retry, source.attempt, rows))
        recovered.sources.sort(key=lambda source: source[:2])
        return recovered

    def attempts(self) -> list[AttemptFile]:
        """Return the attempts' files by number, without those whose writer died while writing them."""
        attempts = []
        for name in self.names():
            if name.startswith("attempt-"):
                with suppress(msgspec.DecodeError):
                    attempts.append(msgspec.json.decode(self.read(name), type=AttemptFile))
        return sorted(attempts, key=lambda attempt: attempt.attempt)

    def complete(self) -> CompleteFile | None:
        """Return `complete.json`, or None if no attempt has reached the end of the shard."""
        try:
            return msgspec.json.decode(self.read("complete.json"), type=CompleteFile)
        except FileNotFoundError:
            return None

    def files(self) -> dict[str, FileStat]:
        """Return all files by name. Raises OSError."""
        files = {}
        for path in self.path.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            files[path.name] = FileStat(stat.st_mtime, stat.st_size)
        return files

    def holder(self) -> Holder | None:
        """Return the active or dead runner, or None if the last one ended in order. Raises OSError."""
        return read_holder(self.path / "lock")

    def last_attempt(self) -> int:
        """Return the highest attempt number in use, 0 if there is none."""
        names = {*self.local_names(), *self.names()}
        return max((key[0] for key in parse_keys(_ATTEMPT, names)), default=0)

    def next_attempt(self) -> int:
        """Return an attempt number above all that are in use."""
        return self.last_attempt() + 1

    def local_names(self) -> Collection[str]:
        """Return the names of the files on the disk. Raises OSError."""
        return [path.name for path in self.path.iterdir()]

    def names(self) -> Collection[str]:
        """Return the names of the finished files. Raises OSError."""
        return self.local_names()

    def read(self, name: str) -> bytes:
        """Return the contents of a small finished file. Raises OSError."""
        return (self.path / name).read_bytes()

    # The operations of an attempt, which writes with `disk`. All raise OSError.

    def put(self, name: str, data: bytes, disk: Disk) -> None:
        """Write a small file, replacing an existing one."""
        disk.put(self.path / name, data)

    def put_new(self, name: str, data: bytes, disk: Disk) -> None:
        """Write a small file. Raises FileExistsError if it exists."""
        disk.put_new(self.path / name, data)

    def remove_journal(self, key: SegmentKey, disk: Disk) -> None:
        """Remove a segment once its part is complete; on an object store, after the part's upload."""
        disk.remove(self.journal(key))
        disk.sync_directory(self.path)

    def recover_local(self, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        """Upload what ended attempts left on this machine. Nothing to do on a disk, where all see it."""

    def heartbeat(self, holder: Holder | None) -> None:
        """Publish the active runner, or that there is none, where the lock is not visible to others."""

    def wait_for_uploads(self) -> None:
        """Return once all files have been uploaded. Raises also StoppedEarly and ResumeError."""

    def detach(self) -> None:
        """Cancel pending uploads; their files stay on this machine."""

    def delete_attempt(self, attempt: int) -> None:
        """Delete the remote files of an attempt that has recorded nothing."""


class Recovered:
    """The outcomes of all attempts at a shard, read once."""

    def __init__(self) -> None:
        self.sources: list[tuple[int, int, Part | Outcomes]] = []
        """The negated retry, the attempt and the rows, in order of precedence."""

    def outcomes(self) -> Outcomes:
        """Return the rows that are done, by outcome."""
        return Outcomes.joined(map(_outcomes, (rows for _, _, rows in self.sources)))

    def of_retry(self, number: int) -> RowSet:
        """Return the rows for which the given retry has recorded a result."""
        retried = RowSet()
        for retry, _, rows in self.sources:
            if -retry == number:
                retried |= _outcomes(rows).rows()
        return retried


def _outcomes(rows: Part | Outcomes) -> Outcomes:
    return rows.outcomes() if isinstance(rows, Part) else rows


def manifest_total(attempts: Iterable[AttemptFile], complete: CompleteFile | None) -> tuple[int | None, bool]:
    """Return the number of rows in the manifest, if an attempt at the shard knew it, and whether it is in doubt.

    It is in doubt if the last attempt reads a text whose end it has not seen: an earlier one may have had a `--limit`.
    """
    totals = [attempt.total for attempt in attempts if not attempt.retry]
    uncounted = complete is None and bool(totals) and totals[-1] is None
    known = [*totals, complete.total if complete else None]
    return max((total for total in known if total is not None), default=None), uncounted


def parse_keys(pattern: re.Pattern[str], names: Iterable[str]) -> set[SegmentKey]:
    """Return the keys of the names that match a pattern."""
    matches = map(pattern.fullmatch, names)
    return {(int(match[1]), int(match[2]) if pattern.groups > 1 else 0) for match in matches if match}
