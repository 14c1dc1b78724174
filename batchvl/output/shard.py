"""One shard's folder, and one attempt at it.

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
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa

from ..values import Shard
from .disk import Disk
from .done import Tally
from .journal import FORMAT, Journal
from .lock import Holder, Lock
from .parts import Part

_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")
_ATTEMPT = re.compile(r"(?:attempt|journal|part)-(\d+)[.-].*")
_JOURNAL = re.compile(r"journal-(\d+)-(\d+)\.log")
_PART = re.compile(r"part-(\d+)-(\d+)\.parquet")

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
    """The manifest's rows, where the attempt knew them at its start."""
    metadata: dict[str, str] = {}
    """What the run said about itself: EngineInfo and the like."""


class CompleteFile(msgspec.Struct):
    """`complete.json`."""

    format: int
    total: int | None
    """The manifest's rows, all shards together."""


@dataclass(frozen=True)
class ShardFolder:
    """A shard's folder: what is in it, whoever wrote it."""

    path: Path
    shard: Shard

    @classmethod
    def of(cls, out: Path, shard: Shard) -> ShardFolder:
        """The shard's folder in the output folder `out`."""
        return cls(out / f"shard-{shard.index:05d}-of-{shard.count:05d}", shard)

    @classmethod
    def all(cls, out: Path) -> list[ShardFolder]:
        """The shards' folders that are there, in order."""
        found = [(path, _SHARD.fullmatch(path.name)) for path in out.iterdir()]
        folders = [cls(path, Shard(int(match[1]), int(match[2]))) for path, match in found if match]
        return sorted(folders, key=lambda folder: folder.shard.index)

    def journal(self, key: Key) -> Path:
        """Where a segment lies."""
        return self.path / f"journal-{key[0]:04d}-{key[1]:06d}.log"

    def part(self, key: Key) -> Path:
        """Where the segment's part lies."""
        return self.path / f"part-{key[0]:04d}-{key[1]:06d}.parquet"

    def sources(self) -> Iterator[Part | Journal]:
        """All that holds records: the journals that no part was made of, then the parts.

        Right while runners are at work here. Raises OSError, and ResumeError for what is damaged or too new.
        """
        journals = self._keys(_JOURNAL)  # before the parts: a journal goes only once its part is there
        parts = self._keys(_PART)
        for key in sorted(journals - parts):
            try:
                yield Journal.read(self.journal(key))
            except FileNotFoundError:
                parts.add(key)
        for key in sorted(parts):
            yield Part.read(self.part(key))

    def recover(self) -> Tally:
        """Which rows are done, and how, by all attempts so far."""
        found: list[tuple[int, int, Part | Tally]] = []
        for source in self.sources():
            rows = source if isinstance(source, Part) else source.tally()  # a journal is large, a tally small
            found.append((-source.retry, source.attempt, rows))
        found.sort(key=lambda one: one[:2])
        return Tally.joined(rows.tally() if isinstance(rows, Part) else rows for _, _, rows in found)

    def attempts(self) -> Iterator[AttemptFile]:
        """What the attempts said about themselves; one that died over saying it is left out."""
        for path in sorted(self.path.glob("attempt-*.json")):
            try:
                yield msgspec.json.decode(path.read_bytes(), type=AttemptFile)
            except msgspec.DecodeError:
                continue

    def complete(self) -> CompleteFile | None:
        """Whether an attempt reached the shard's end."""
        try:
            return msgspec.json.decode((self.path / "complete.json").read_bytes(), type=CompleteFile)
        except FileNotFoundError:
            return None

    def last_attempt(self) -> int:
        """The highest number that an attempt has taken, 0 where there was none."""
        return max((key[0] for key in self._keys(_ATTEMPT)), default=0)

    def _keys(self, pattern: re.Pattern[str]) -> set[Key]:
        matches = (pattern.fullmatch(path.name) for path in self.path.iterdir())
        return {(int(m[1]), int(m[2]) if pattern.groups > 1 else 0) for m in matches if m}


class Attempt:
    """An attempt at a shard: holds its lock and has a number of its own."""

    def __init__(self, folder: ShardFolder, *, retry: int, total: int | None, disk: Disk) -> None:
        """Makes the folder, takes the lock, takes the next number. Raises ResumeError and OSError."""
        self.folder, self._disk = folder, disk
        disk.make_folder(folder.path)
        self._lock = Lock(folder.path / "lock")
        try:
            self._file = self._claim(retry, total)
        except BaseException:
            self._lock.release()
            raise
        self.number, self.retry = self._file.attempt, retry

    def _claim(self, retry: int, total: int | None) -> AttemptFile:
        me = Holder.me()
        versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "msgspec": msgspec.__version__}
        number = self.folder.last_attempt()
        while True:
            number += 1
            file = AttemptFile(FORMAT, number, retry, me.host, me.pid, me.since, versions, total)
            try:
                self._disk.put_new(self._path(number), msgspec.json.encode(file))
            except FileExistsError:
                continue  # somebody whom the lock does not keep out was faster
            return file

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Writes what the run says about itself into the attempt's file. Raises OSError."""
        self._file.metadata = dict(metadata)
        self._disk.put(self._path(self.number), msgspec.json.encode(self._file))

    def complete(self, total: int | None) -> None:
        """Tells that the shard's end was reached; total: the manifest's rows. Raises OSError."""
        self._disk.put(self.folder.path / "complete.json", msgspec.json.encode(CompleteFile(FORMAT, total)))

    def release(self) -> None:
        """Lets the next one in."""
        self._lock.release()

    def _path(self, number: int) -> Path:
        return self.folder.path / f"attempt-{number:04d}.json"
