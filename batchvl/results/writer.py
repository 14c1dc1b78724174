"""The writer: one thread that commits records in groups and converts full segments to parts between the commits."""

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
_Frame = tuple[bytes, str | None]  # the frame and the error code, None if the row is ok


class Writer:
    """Takes records on the event loop's thread and writes them on its own. At most one fsync is in flight."""

    def __init__(
        self,
        attempt: Attempt,
        schema: pa.Schema,
        *,
        commit_seconds: float,
        part_rows: int,
        disk: Disk,
        part_seconds: float | None = None,
        on_commit: OnCommit | None = None,
    ) -> None:
        """Start no thread yet.

        Args:
            attempt: Names the segments and parts.
            schema: The output's schema.
            commit_seconds: Longest time between a record and its commit.
            part_rows: Rows after which a segment becomes a part.
            disk: Writes the files.
            part_seconds: Time after which a segment becomes a part however few rows it has; None: no limit.
            on_commit: Called on the event loop's thread with the counts of a commit.
        """
        self._attempt, self._schema, self._disk = attempt, schema, disk
        self._commit_seconds, self._part_rows, self._on_commit = commit_seconds, part_rows, on_commit
        self._part_seconds = inf if part_seconds is None else part_seconds
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

        # Used by the event loop's thread only.
        self._uncommitted = 0
        self._waiters: list[asyncio.Future[None]] = []

        # Used by both threads, under the condition.
        self._wake = threading.Condition(threading.Lock())
        self._frames: list[_Frame] = []
        self._bytes = 0
        self._due = 0.0
        self._metadata: Mapping[str, str] | None = None
        self._closing = False

        # Used by the writer's thread only.
        self._segment: Segment | None = None
        self._roll_at = inf
        self._number = 0
        self._full: deque[tuple[int, int]] = deque()  # numbers and rows of full segments
        self._conversion: Iterator[Counts | None] | None = None

    def add(self, record: Record) -> None:
        """Add a record. Takes microseconds and never waits. Raises the writer's failure."""
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

    async def wait_for_capacity(self) -> None:
        """Return once the backlog has room for more records. Raises the writer's failure."""
        while self._uncommitted > BACKLOG_BYTES and not self._failure:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        if self._failure:
            raise self._failure

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Set the parts' metadata. Until then records stay in segments; `close` converts them in any case."""
        with self._wake:
            self._metadata = dict(metadata)
            self._wake.notify()

    async def close(self) -> None:
        """Return once all records are committed and in parts. Raises the writer's failure."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread:
            await asyncio.to_thread(self._thread.join)
        if self._failure:
            raise self._failure

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        # A daemon: an unresponsive file system must not keep the process from exiting.
        self._thread = threading.Thread(target=self._run, name="batchvl-writer", daemon=True)
        self._thread.start()

    def _committed(self, counts: Counts, size: int) -> None:
        self._uncommitted -= size
        self._wake_waiters()
        if self._on_commit:
            self._on_commit(counts)

    def _wake_waiters(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # The methods below run on the writer's thread.

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except OSError as error:
            self._failure = as_stopped_early(self._attempt.directory.path, error)
            self._failure.__cause__ = error
        except BaseException as error:
            self._failure = error
        if self._failure:
            self._frames.clear()
            self._abandon()
            self._call_in_loop(self._wake_waiters)

    def _step(self) -> bool:
        """Wait for work and do one round of it. Returns False once everything is written."""
        frames = self._wait_for_work()
        if frames:
            self._commit(frames)
        if self._segment and self._is_old():
            self._roll(self._segment)
        if self._can_convert():  # also right after a commit: a slow disk must not postpone parts forever
            self._convert_step()
        elif self._closing and not self._frames:
            if not self._segment:
                return False
            self._roll(self._segment)
        return True

    def _wait_for_work(self) -> list[_Frame]:
        """Wait until there is something to do; take and return the frames if a commit is due."""
        with self._wake:
            while not (self._is_due() or self._can_convert() or self._closing or self._is_old()):
                until = min(self._due if self._frames else inf, self._roll_at)
                self._wake.wait(None if until == inf else until - monotonic())
            if not self._is_due():
                return []
            frames, self._frames, self._bytes = self._frames, [], 0
            return frames

    def _is_due(self) -> bool:
        return bool(self._frames) and (self._closing or self._bytes >= COMMIT_BYTES or monotonic() >= self._due)

    def _is_old(self) -> bool:
        return monotonic() >= self._roll_at

    def _can_convert(self) -> bool:
        return self._conversion is not None or (bool(self._full) and (self._closing or self._metadata is not None))

    def _commit(self, frames: list[_Frame]) -> None:
        """Append the frames to segments, and report each commit."""
        while frames:
            if self._segment is None:
                self._number += 1
                path = self._attempt.directory.journal((self._attempt.number, self._number))
                self._segment = Segment(path, self._attempt.number, self._attempt.retry, self._disk)
                self._roll_at = monotonic() + self._part_seconds
            capacity = self._part_rows - self._segment.rows
            fitting, frames = frames[:capacity], frames[capacity:]
            self._segment.append([data for data, _ in fitting])
            failed = Counter(code for _, code in fitting if code is not None)
            counts = Counts(len(fitting) - failed.total(), dict(failed))
            self._call_in_loop(self._committed, counts, sum(len(data) for data, _ in fitting))
            if self._segment.rows >= self._part_rows or self._segment.size >= PART_BYTES:
                self._roll(self._segment)

    def _roll(self, segment: Segment) -> None:
        """Close the segment; the next commit begins another one."""
        segment.close()
        self._segment, self._roll_at = None, inf
        self._full.append((self._number, segment.rows))

    def _convert_step(self) -> None:
        """Do one step of a conversion: a few milliseconds, by which a commit may be late."""
        number, rows = self._full[0]
        key = (self._attempt.number, number)
        journal, part = self._attempt.directory.journal(key), self._attempt.directory.part(key)
        if self._conversion is None:
            segment = Journal.read(journal)
            self._conversion = parts.write(segment, part, self._schema, self._metadata or {}, self._disk, rows)
        if next(self._conversion) is None:
            return
        self._conversion = None
        self._full.popleft()
        self._attempt.directory.remove_journal(key, self._disk)

    def _abandon(self) -> None:
        self._conversion = None  # which removes its temporary file
        if self._segment:
            try:
                self._segment.close()
            except OSError:
                pass  # the original failure is reported

    def _call_in_loop(self, call: Callable[..., None], *values: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *values)
        except RuntimeError:
            pass  # the loop is closed
