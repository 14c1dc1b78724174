"""One shard's folder: what is in it, and what an attempt at it (`attempt.py`) does there.

    OUT/run.json                         what the run is: see `guard.py`
    OUT/shard-00000-of-00001/
        lock                             held by the runner that is at work here
        attempt-0001.json                who tried, when, with what; made exclusively, it numbers the attempts
        journal-0001-000001.log          attempt 1's first segment, until a part holds its records
        part-0001-000001.parquet         the part made of it; where both are there, the part counts alone
        complete.json                    there once an attempt reached the shard's end
    OUT/results.parquet                  all shards merged
    OUT/summary.json                     the runner's last words

Every attempt writes files of its own names and only reads those of the others, so that attempts that do not see each
other (two hosts, a file system without locks) cannot harm each other. What a dead attempt left behind stays where it
is: journals are read, names that start with a dot are temporary and ignored.

On an object store the layout is the same; `remote.py` has what differs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import pyarrow as pa

from ..config.units import Shard
from ..storage.disk import Disk
from .journal import Journal
from .lock import Holder, holder
from .parts import Part
from .rowset import Outcomes, RowSet

_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
_ATTEMPT = re.compile(r"(?:attempt|journal|part)-(\d+)[.-].*")
JOURNAL = re.compile(r"journal-(\d+)-(\d+)\.log")
PART = re.compile(r"part-(\d+)-(\d+)\.parquet")

Key = tuple[int, int]
"""Attempt and number: what a segment and its part have in common."""


class AttemptFile(msgspec.Struct, omit_defaults=True):
    """`attempt-0001.json`."""

    format: int
    attempt: int
    retry: int
    host: str
    pid: int
    since: str
    versions: dict[str, str]
    total: int | None = None
    """The manifest's rows, at most `--limit`, where the attempt knew them at its start or got to know them."""
    codes: list[str] | None = None
    """Of the failures that a retry asks again; None is all of them. Means nothing where `retry` is 0."""
    ended: bool = False
    """Whether a retry came to its end: the next one is another."""
    metadata: dict[str, str] = {}
    """What the run said about itself: EngineInfo and the like."""
    up: float | None = None
    """When it did, since the engine was up: seconds since the epoch."""


class CompleteFile(msgspec.Struct):
    """`complete.json`."""

    format: int
    total: int | None
    """The manifest's rows, all shards together."""


class FileStat(NamedTuple):
    """By what a file is known to have changed."""

    time: float
    """When it was written last, in seconds since the epoch, by the file system's clock."""
    size: int


class Storage(Protocol):
    """An output that does not lie on a disk: see `remote.py`."""

    @property
    def path(self) -> Path:
        """The folder on a disk for what cannot lie there: journals, locks, logs."""

    def folders(self) -> list[str]:
        """The folders in it, by name."""

    def shard(self, path: Path, shard: Shard) -> ShardFolder:
        """The shard's folder there; path: the one on the disk."""


@dataclass(frozen=True)
class ShardFolder:
    """A shard's folder: what is in it, whoever wrote it."""

    path: Path
    """Where its journals and all that a runner needs on a disk lie; on a disk, all of it."""
    shard: Shard

    @classmethod
    def of(cls, out: Path | Storage, shard: Shard) -> ShardFolder:
        """The shard's folder in the output folder `out`."""
        name = f"shard-{shard.index:05d}-of-{shard.count:05d}"
        return cls(out / name, shard) if isinstance(out, Path) else out.shard(out.path / name, shard)

    @classmethod
    def all(cls, out: Path | Storage, count: int | None = None) -> list[ShardFolder]:
        """The shards' folders that are there, in order; of a run in `count` shards only its own."""
        names = [path.name for path in out.iterdir()] if isinstance(out, Path) else out.folders()
        shards = [Shard(int(match[1]), int(match[2])) for match in map(_SHARD.fullmatch, names) if match]
        own = (shard for shard in shards if count is None or shard.count == count)
        return [cls.of(out, shard) for shard in sorted(own, key=lambda shard: shard.index)]

    def journal(self, key: Key) -> Path:
        """Where a segment lies."""
        return self.path / f"journal-{key[0]:04d}-{key[1]:06d}.log"

    def part(self, key: Key) -> Path:
        """Where the segment's part lies."""
        return self.path / f"part-{key[0]:04d}-{key[1]:06d}.parquet"

    def keys(self) -> tuple[set[Key], set[Key]]:
        """The journals that no part was made of, and the parts. Of the former some may be parts by now."""
        journals = keys(JOURNAL, self.here())  # before the parts: a journal goes only once its part is there
        parts = keys(PART, self.names())
        return journals - parts, parts

    def sources(self, scratch: Path | None = None) -> Iterator[Part | Journal]:
        """All that holds records: the journals that no part was made of, then the parts.

        scratch: a folder for copies of parts that are not on a disk, where their rows are wanted and not their footers
        alone.

        Right while runners are at work here. Raises OSError, and ResumeError for what is damaged or too new.
        """
        journals, parts = self.keys()
        for key in sorted(journals):
            try:
                yield Journal.read(self.journal(key))
            except FileNotFoundError:
                parts.add(key)
        for _, read in self.reading(sorted(parts), scratch):
            yield read()

    def reading(self, keys: Iterable[Key], scratch: Path | None = None) -> Iterator[tuple[Key, Callable[[], Part]]]:
        """For each part what reads it; that raises what `Part.read` raises. scratch: as of `sources`."""
        for key in keys:
            yield key, partial(Part.read, self.part(key))

    def recover(self) -> Recovered:
        """Which rows are done, and how, by all attempts so far. Raises what `sources` raises."""
        found = Recovered()
        for source in self.sources():
            rows = source if isinstance(source, Part) else source.tally()  # a journal is large, a tally small
            found.sources.append((-source.retry, source.attempt, rows))
        found.sources.sort(key=lambda one: one[:2])
        return found

    def attempts(self) -> list[AttemptFile]:
        """What the attempts said about themselves, by number; one that died over saying it is left out."""
        found = []
        for name in self.names():
            if name.startswith("attempt-"):
                with suppress(msgspec.DecodeError):
                    found.append(msgspec.json.decode(self.read(name), type=AttemptFile))
        return sorted(found, key=lambda attempt: attempt.attempt)

    def complete(self) -> CompleteFile | None:
        """Whether an attempt reached the shard's end."""
        try:
            return msgspec.json.decode(self.read("complete.json"), type=CompleteFile)
        except FileNotFoundError:
            return None

    def files(self) -> dict[str, FileStat]:
        """All files by name. Raises OSError."""
        found = {}
        for path in self.path.iterdir():
            try:
                now = path.stat()
            except FileNotFoundError:
                continue
            found[path.name] = FileStat(now.st_mtime, now.st_size)
        return found

    def holder(self) -> Holder | None:
        """The runner at work here, or dead; None where the last one ended in order. Raises OSError."""
        return holder(self.path / "lock")

    def last_attempt(self) -> int:
        """The highest number that an attempt has taken, 0 where there was none."""
        return max((key[0] for key in keys(_ATTEMPT, {*self.here(), *self.names()})), default=0)

    def next_attempt(self) -> int:
        """A number for an attempt, above all that were taken."""
        return self.last_attempt() + 1

    def here(self) -> Iterable[str]:
        """The names of the files on the disk. Raises OSError."""
        return [path.name for path in self.path.iterdir()]

    def names(self) -> Iterable[str]:
        """The names of the finished files. Raises OSError."""
        return self.here()

    def read(self, name: str) -> bytes:
        """A small finished file. Raises OSError."""
        return (self.path / name).read_bytes()

    # What an attempt does; `disk` is what it writes with. All raise OSError.

    def put(self, name: str, data: bytes, disk: Disk) -> None:
        """Writes a small file, over what is there."""
        disk.put(self.path / name, data)

    def put_new(self, name: str, data: bytes, disk: Disk) -> None:
        """The same, but FileExistsError where there is such a file."""
        disk.put_new(self.path / name, data)

    def settle(self, key: Key, disk: Disk) -> None:
        """Removes a segment whose part is in its place."""
        disk.remove(self.journal(key))
        disk.sync_folder(self.path)

    def rescue(self, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        """Brings to where all see it what attempts that have ended left where only this machine does."""

    def beat(self, holder: Holder | None) -> None:
        """Tells who is at work, or that nobody is any more, where the lock is not seen."""

    def wait(self) -> None:
        """Returns once all that was put is where it belongs. Raises StoppedEarly and ResumeError as well."""

    def leave(self) -> None:
        """What is still on its way stays here."""

    def forget(self, attempt: int) -> None:
        """Takes back an attempt that has recorded nothing, also from where the disk's files are not."""


class Recovered:
    """What all attempts at a shard recorded, read once."""

    def __init__(self) -> None:
        self.sources: list[tuple[int, int, Part | Outcomes]] = []
        """Less the retry, the attempt, and the rows, in the order in which they win."""

    def tally(self) -> Outcomes:
        """Which rows are done, and how."""
        return Outcomes.joined(map(_tally, (rows for _, _, rows in self.sources)))

    def of_retry(self, number: int) -> RowSet:
        """The rows that the so-many-th retry has asked, and got a result of."""
        found = RowSet()
        for retry, _, rows in self.sources:
            if -retry == number:
                found |= _tally(rows).rows()
        return found


def _tally(rows: Part | Outcomes) -> Outcomes:
    return rows.tally() if isinstance(rows, Part) else rows


def total_of(attempts: Iterable[AttemptFile], complete: CompleteFile | None) -> tuple[int | None, bool]:
    """The manifest's rows, if an attempt at a shard knew them; and whether that is in doubt.

    It is where the last attempt is at a text whose end it has not seen: an earlier one may have had a --limit.
    """
    totals = [attempt.total for attempt in attempts if not attempt.retry]
    uncounted = complete is None and bool(totals) and totals[-1] is None
    known = [*totals, complete.total if complete else None]
    return max((total for total in known if total is not None), default=None), uncounted


def keys(pattern: re.Pattern[str], names: Iterable[str]) -> set[Key]:
    """The keys in the names that match."""
    matches = map(pattern.fullmatch, names)
    return {(int(m[1]), int(m[2]) if pattern.groups > 1 else 0) for m in matches if m}
