"""Repeated reads of one shard's directory, each of which reads only what is new."""

from __future__ import annotations

import re

import msgspec

from ..errors import ResumeError
from .journal import Tail
from .lock import Holder
from .parts import Part
from .record import Counts
from .rowset import Outcomes, RowSet
from .shard import AttemptFile, FileStat, SegmentKey, ShardDirectory, manifest_total

_ATTEMPT = re.compile(r"[a-z]+-(\d+)[.-].*")
_RECORD_FILES = ("journal-", "part-")

Rank = tuple[int, int]
"""The negated retry and the attempt: among results of a row with the same status, the one with the lower rank wins."""


class _Summary(msgspec.Struct):
    """The fields of `summary.json` that are needed here."""

    message: str = ""


class ShardPoller:
    """The state of a shard's directory, which runners may be writing.

    A part never changes: once it was read, its rows are merged into those of its attempt and it is forgotten. Of a
    journal, only new records are read. A directory without changes costs a listing. Memory: a few bits per row.
    """

    def __init__(self, directory: ShardDirectory) -> None:
        self.directory = directory
        self.counts = Counts()
        """The rows that are done, by all attempts."""
        self.total: int | None = None
        """Number of rows in the manifest, if an attempt knew it."""
        self.uncounted = False
        """Whether `total` is in doubt: see `manifest_total`."""
        self.holder: Holder | None = None
        """The last attempt's runner; None once it has ended in order."""
        self.alive: bool | None = None
        """Whether that process is alive; None if unknown here."""
        self.attempt: AttemptFile | None = None
        """The last attempt; None before the first."""
        self.recorded = 0
        """Number of rows recorded by the last attempt."""
        self.last_sign: float | None = None
        """When the last attempt last wrote one of its files or the lock: seconds since the epoch, by the file system's
        clock."""
        self.last_row: float | None = None
        """When the last attempt last recorded a row."""
        self.problem = ""
        """The first error while reading; everything else counts nevertheless."""
        self._files: dict[str, FileStat] = {}
        self._reset_rows()

    def poll(self) -> None:
        """Update all attributes. Raises nothing: errors are reported in `problem`."""
        try:
            # The runner before the records: if it is gone by now, all its records can be read.
            self.holder = self.directory.holder()
            self.alive = self.holder.alive() if self.holder else False
            files = self.directory.files()
            if files == self._files and not self.problem:
                return
            self._files, self.problem = files, ""
            self._update_attempts()
            self._update_rows()
        except FileNotFoundError:
            self._files = {}  # removed since the listing: the next poll sees the result
        except (OSError, msgspec.DecodeError) as error:
            self._set_problem(error)

    def stop_message(self) -> str:
        """Return why the last attempt stopped, from the summary that it wrote; "" if there is none."""
        name, path = "summary.json", self.directory.path.parent / "summary.json"
        try:
            if self.directory.shard.count > 1:
                written, data = self._files[name].time, self.directory.read(name)
            else:
                written, data = path.stat().st_mtime, path.read_bytes()
            if written < self._files["lock"].time:
                return ""  # an earlier attempt's: an attempt releases the lock before it writes its summary
            return " ".join(msgspec.json.decode(data, type=_Summary).message.split())
        except (OSError, KeyError, msgspec.DecodeError):
            return ""

    def _update_attempts(self) -> None:
        attempts = self.directory.attempts()
        self.total, self.uncounted = manifest_total(attempts, self.directory.complete())
        self.attempt = attempts[-1] if attempts else None
        number = self.attempt.attempt if self.attempt else None
        times = {name: file.time for name, file in self._files.items() if _attempt_of(name) in (number, "lock")}
        self.last_sign = max(times.values(), default=None)
        self.last_row = max((time for name, time in times.items() if name.startswith(_RECORD_FILES)), default=None)

    def _update_rows(self) -> None:
        journals, parts = self.directory.keys()
        if (self._read_parts | self._tails.keys()) - journals - parts:
            self._reset_rows()  # a file was moved away: its rows are not done any more
        for key in sorted(journals):
            try:
                self._tails.setdefault(key, Tail(self.directory.journal(key))).follow()
            except FileNotFoundError:
                parts.add(key)  # it has become a part meanwhile
            except (OSError, ResumeError) as error:
                self._set_problem(error)
        for key, read in self.directory.part_readers(sorted(parts - self._read_parts)):
            try:
                self._add_part(read())
            except (OSError, ResumeError) as error:
                self._set_problem(error)
                continue
            self._read_parts.add(key)
            self._tails.pop(key, None)
        ranked = [*self._part_outcomes.items()]
        ranked += [((-tail.retry, tail.attempt), tail.outcomes) for tail in self._tails.values()]
        ranked.sort(key=lambda item: item[0])
        self.counts = Outcomes.joined(outcomes for _, outcomes in ranked).counts()
        number = self.attempt.attempt if self.attempt else None
        self.recorded = sum(outcomes.counts().rows for (_, attempt), outcomes in ranked if attempt == number)

    def _add_part(self, part: Part) -> None:
        outcomes = part.outcomes()
        known = self._part_outcomes.setdefault((-part.retry, part.attempt), Outcomes())
        known.ok |= outcomes.ok
        for code, rows in outcomes.failed.items():
            known_rows = known.failed.setdefault(code, RowSet())
            known_rows |= rows

    def _set_problem(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.strerror:
            error = OSError(f"{error.filename or self.directory.path}: cannot be read: {error.strerror}")
        self.problem = self.problem or str(error)

    def _reset_rows(self) -> None:
        self._read_parts: set[SegmentKey] = set()
        self._part_outcomes: dict[Rank, Outcomes] = {}
        self._tails: dict[SegmentKey, Tail] = {}


def _attempt_of(name: str) -> int | str:
    """Return the attempt that wrote a file, by the file's name; the name itself if it belongs to no attempt."""
    match = _ATTEMPT.fullmatch(name)
    return int(match[1]) if match else name
