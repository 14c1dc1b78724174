"""One shard's folder as it is looked at again and again: each time only what is new is read."""

from __future__ import annotations

import re

import msgspec

from ..errors import ResumeError
from .journal import Tail
from .lock import Holder
from .parts import Part
from .record import Counts
from .rowset import Outcomes, RowSet
from .shard import AttemptFile, FileStat, Key, ShardFolder, total_of

_OF_ATTEMPT = re.compile(r"[a-z]+-(\d+)[.-].*")
_ROWS = ("journal-", "part-")

Rank = tuple[int, int]
"""Less the retry, and the attempt: of two results of a row, alike in being failed or not, the lower rank's wins."""


class _Summary(msgspec.Struct):
    """As much of `summary.json` as is told here."""

    message: str = ""


class ShardPoller:
    """What is known of a shard's folder, which may be written meanwhile.

    A part never changes: once it was read, its rows are taken into its attempt's and it is not kept. Of a journal only
    the records after those already known are read. A folder in which no file has changed costs a listing. Memory: a few
    bits a row.
    """

    def __init__(self, folder: ShardFolder) -> None:
        self.folder = folder
        self.counts = Counts()
        """The rows that are done, by all attempts."""
        self.total: int | None = None
        """The manifest's rows, if an attempt knew them."""
        self.uncounted = False
        """Whether that is in doubt: see `total_of`."""
        self.holder: Holder | None = None
        """The last attempt's runner; None once that has ended in order."""
        self.alive: bool | None = None
        """Whether that process lives; None where it cannot be told from here."""
        self.attempt: AttemptFile | None = None
        """The last one; None before the first."""
        self.recorded = 0
        """How many rows it has recorded."""
        self.last_sign: float | None = None
        """When a file of its, or the lock, was last written: seconds since the epoch, by the file system's clock."""
        self.last_row: float | None = None
        """When it last recorded a row."""
        self.problem = ""
        """The first thing that cannot be read here; what else there is counts."""
        self._files: dict[str, FileStat] = {}
        self._forget()

    def look(self) -> None:
        """Brings it all up to date. Raises nothing: `problem` has it."""
        try:
            # First the runner, then the records: of one that is gone by now, all records are there to be read.
            self.holder = self.folder.holder()
            self.alive = self.holder.alive() if self.holder else False
            files = self.folder.files()
            if files == self._files and not self.problem:
                return
            self._files, self.problem = files, ""
            self._look_at_attempts()
            self._look_at_rows()
        except FileNotFoundError:
            self._files = {}  # taken away between the listing and now: what is there then, the next look sees
        except (OSError, msgspec.DecodeError) as error:
            self._failed(error)

    def last_words(self) -> str:
        """Why the last attempt stopped, by the summary that it left; "" where it left none."""
        name, path = "summary.json", self.folder.path.parent / "summary.json"
        try:
            if self.folder.shard.count > 1:
                written, data = self._files[name].time, self.folder.read(name)
            else:
                written, data = path.stat().st_mtime, path.read_bytes()
            if written < self._files["lock"].time:
                return ""  # an earlier attempt's: one gives the lock back, then it writes its summary
            return " ".join(msgspec.json.decode(data, type=_Summary).message.split())
        except (OSError, KeyError, msgspec.DecodeError):
            return ""

    def _look_at_attempts(self) -> None:
        attempts = self.folder.attempts()
        self.total, self.uncounted = total_of(attempts, self.folder.complete())
        self.attempt = attempts[-1] if attempts else None
        number = self.attempt.attempt if self.attempt else None
        times = {name: file.time for name, file in self._files.items() if _attempt(name) in (number, "lock")}
        self.last_sign = max(times.values(), default=None)
        self.last_row = max((time for name, time in times.items() if name.startswith(_ROWS)), default=None)

    def _look_at_rows(self) -> None:
        journals, parts = self.folder.keys()
        if (self._parts | self._tails.keys()) - journals - parts:
            self._forget()  # somebody has moved a file away: its rows are not there any more
        for key in sorted(journals):
            try:
                self._tails.setdefault(key, Tail(self.folder.journal(key))).follow()
            except FileNotFoundError:
                parts.add(key)  # it has become one since
            except (OSError, ResumeError) as error:
                self._failed(error)
        for key, read in self.folder.reading(sorted(parts - self._parts)):
            try:
                self._take(read())
            except (OSError, ResumeError) as error:
                self._failed(error)
                continue
            self._parts.add(key)
            self._tails.pop(key, None)
        found = [*self._in_parts.items(), *(((-tail.retry, tail.attempt), tail.tally) for tail in self._tails.values())]
        found.sort(key=lambda one: one[0])
        self.counts = Outcomes.joined(tally for _, tally in found).counts()
        number = self.attempt.attempt if self.attempt else None
        self.recorded = sum(tally.counts().rows for (_, attempt), tally in found if attempt == number)

    def _take(self, part: Part) -> None:
        new, known = part.tally(), self._in_parts.setdefault((-part.retry, part.attempt), Outcomes())
        known.ok |= new.ok
        for code, rows in new.failed.items():
            mine = known.failed.setdefault(code, RowSet())
            mine |= rows

    def _failed(self, error: Exception) -> None:
        if isinstance(error, OSError) and error.strerror:
            error = OSError(f"{error.filename or self.folder.path}: cannot be read: {error.strerror}")
        self.problem = self.problem or str(error)

    def _forget(self) -> None:
        self._parts: set[Key] = set()
        self._in_parts: dict[Rank, Outcomes] = {}
        self._tails: dict[Key, Tail] = {}


def _attempt(name: str) -> int | str:
    """The attempt that a file is of, by its name; the name where it is of none."""
    found = _OF_ATTEMPT.fullmatch(name)
    return int(found[1]) if found else name
