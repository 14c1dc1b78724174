"""The writer: one thread that commits records in groups and makes parts of full segments between the commits."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from math import inf
from time import monotonic

import pyarrow as pa

from ..storage.disk import Disk, as_stopped_early
from . import parts
from .attempt import Attempt
from .journal import Journal, Segment, frame
from .record import Counts, Record, encode

COMMIT_BYTES = 4 * 2**20
PART_BYTES = 64 * 2**20
BACKLOG_BYTES = 32 * 2**20

OnCommit = Callable[[Counts], None]
_Frame = tuple[bytes, str | None]  # the frame, and the error's code, None where the row is ok


class Writer:
    """Takes records on the event loop's thread and writes them on its own. At most one fsync is in flight."""

    def __init__(
        self, attempt: Attempt, schema: pa.Schema, *, commit_seconds: float, part_rows: int, disk: Disk,
        part_seconds: float | None = None, on_commit: OnCommit | None = None,
    ) -> None:  # fmt: skip
        """part_seconds: a segment becomes a part after so long, however few rows it has; None: it may stay one."""
        self._attempt, self._schema, self._disk = attempt, schema, disk
        self._commit_seconds, self._part_rows, self._on_commit = commit_seconds, part_rows, on_commit
        self._part_seconds = inf if part_seconds is None else part_seconds
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

        # The event loop's thread alone uses these.
        self._uncommitted = 0
        self._waiters: list[asyncio.Future[None]] = []

        # Both threads use these, under the condition.
        self._wake = threading.Condition(threading.Lock())
        self._frames: list[_Frame] = []
        self._bytes = 0
        self._due = 0.0
        self._metadata: Mapping[str, str] | None = None
        self._closing = False

        # The writer's thread alone uses these.
        self._segment: Segment | None = None
        self._roll_at = inf
        self._number = 0
        self._full: deque[tuple[int, int]] = deque()  # segments' numbers and rows
        self._conversion: Iterator[Counts | None] | None = None

    def add(self, record: Record) -> None:
        """Hands a record over; a few microseconds, never waits. Raises what the writer failed with."""
        if self._failure:
            raise self._failure
        if self._thread is None:
            self._start()
        data = frame(encode(record))
        code = None if record.status == "ok" else record.error.code if record.error else ""
        self._uncommitted += len(data)
        with self._wake:
            first = not self._frames
            self._frames.append((data, code))
            self._bytes += len(data)
            if first:
                self._due = monotonic() + self._commit_seconds
            if first or self._bytes >= COMMIT_BYTES:
                self._wake.notify()

    async def room(self) -> None:
        """Returns once there is room for more records. Raises what the writer failed with."""
        while self._uncommitted > BACKLOG_BYTES and not self._failure:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._failure:
            raise self._failure

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Gives the parts' metadata. Before, records stay in segments; at the end they become parts either way."""
        with self._wake:
            self._metadata = dict(metadata)
            self._wake.notify()

    async def close(self) -> None:
        """Returns once all is committed and in parts. Raises what the writer failed with."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        if self._failure:
            raise self._failure

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A daemon: a file system that hangs must not keep a process that was told to leave.
        self._thread = threading.Thread(target=self._run, name="batchvl-writer", daemon=True)
        self._thread.start()

    def _committed(self, counts: Counts, size: int) -> None:
        self._uncommitted -= size
        self._let_in()
        if self._on_commit:
            self._on_commit(counts)

    def _let_in(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # From here on: the writer's thread.

    def _run(self) -> None:
        try:
            while self._next():
                pass
        except OSError as error:
            self._failure = as_stopped_early(self._attempt.folder.path, error)
            self._failure.__cause__ = error
        except BaseException as error:
            self._failure = error
        if self._failure:
            self._frames.clear()
            self._abandon()
            self._tell(self._let_in)

    def _next(self) -> bool:
        """Does what comes next; False once there is nothing left to do, ever."""
        with self._wake:
            while not (due := self._is_due()) and not self._can_convert() and not self._closing and not self._is_old():
                until = min(self._due if self._frames else inf, self._roll_at)
                self._wake.wait(None if until == inf else until - monotonic())
            frames: list[_Frame] = []
            if due:
                frames, self._frames, self._bytes = self._frames, frames, 0
        if frames:
            self._commit(frames)
        if self._segment and self._is_old():
            self._roll(self._segment)
        if self._can_convert():  # also after a commit: a disk that is always behind must not put parts off for good
            self._convert()
        elif self._closing and not self._frames:
            if not self._segment:
                return False
            self._roll(self._segment)
        return True

    def _is_due(self) -> bool:
        return bool(self._frames) and (self._closing or self._bytes >= COMMIT_BYTES or monotonic() >= self._due)

    def _is_old(self) -> bool:
        return monotonic() >= self._roll_at

    def _can_convert(self) -> bool:
        return self._conversion is not None or (bool(self._full) and (self._closing or self._metadata is not None))

    def _commit(self, frames: list[_Frame]) -> None:
        while frames:
            if self._segment is None:
                self._number += 1
                path = self._attempt.folder.journal((self._attempt.number, self._number))
                self._segment = Segment(path, self._attempt.number, self._attempt.retry, self._disk)
                self._roll_at = monotonic() + self._part_seconds
            fitting = self._part_rows - self._segment.rows
            now, frames = frames[:fitting], frames[fitting:]
            self._segment.append([data for data, _ in now])
            failed = Counter(code for _, code in now if code is not None)
            counts = Counts(len(now) - failed.total(), dict(failed))
            self._tell(self._committed, counts, sum(len(data) for data, _ in now))
            if self._segment.rows >= self._part_rows or self._segment.size >= PART_BYTES:
                self._roll(self._segment)

    def _roll(self, segment: Segment) -> None:
        segment.close()
        self._segment, self._roll_at = None, inf
        self._full.append((self._number, segment.rows))

    def _convert(self) -> None:
        """A step of making a part: a few milliseconds, so that commits are never late by more."""
        number, rows = self._full[0]
        key = (self._attempt.number, number)
        journal, part = self._attempt.folder.journal(key), self._attempt.folder.part(key)
        if self._conversion is None:
            found = Journal.read(journal)
            self._conversion = parts.write(found, part, self._schema, self._metadata or {}, self._disk, rows)
        if next(self._conversion) is None:
            return
        self._conversion = None
        self._full.popleft()
        self._attempt.folder.settle(key, self._disk)

    def _abandon(self) -> None:
        self._conversion = None  # which removes its temporary file
        if self._segment:
            try:
                self._segment.close()
            except OSError:
                pass  # the failure that led here is the one to tell

    def _tell(self, call: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *values)
        except RuntimeError:
            pass  # the loop is closed: nobody is left to tell
