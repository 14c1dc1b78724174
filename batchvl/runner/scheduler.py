"""The core loop of a run: manifest -> fetch -> prepare -> engine -> journal, with one task per fetched row."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import NamedTuple

from ..concurrency import SharedTask, main_error
from ..config.options import RunOptions
from ..errors import BatchvlError, EngineCrashed, EngineLost, GaveUpWaiting, RowError
from ..images.fetch_ahead import FetchedGroup
from ..images.pipeline import ImagePipeline, PreparedGroup, image_stubs
from ..images.worker_pool import RowFailed
from ..results import Record, ResultStore
from ..serving.exits import EngineExited
from ..serving.pool import ReplicaPool
from ..types import Failure, Image, Response, Row
from .passes import Passes, ReadRows
from .poison import PoisonBisector, PoisonRow
from .progress import Progress

MIN_IN_FLIGHT = 256
"""Rows between fetch and journal, even for an engine that holds few."""
WAITING_ROWS = 4096
"""Rows that may wait for a retry before no more are admitted."""
RETRY_SECONDS = 0.5
"""Pause before the first retry. Later ones are random, of up to this long, doubled with each attempt."""
MAX_RETRY_SECONDS = 60.0


class Outcome(NamedTuple):
    """The result of an attempt at a row."""

    response: Response
    images: tuple[Image, ...] = ()

    @property
    def is_transient(self) -> bool:
        """Whether it is a failure that a retry of the engine may fix. Fetching has retries of its own."""
        failure = self.response.failure
        return failure is not None and failure.retryable and failure.stage == "engine"


class Slot:
    """A row's slot among those in flight. Created acquired; `release` may be called more than once."""

    __slots__ = ("_held", "_slots")

    def __init__(self, slots: asyncio.Semaphore) -> None:
        self._slots, self._held = slots, True

    async def acquire(self) -> None:
        await self._slots.acquire()
        self._held = True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._slots.release()


class Scheduler:
    """Takes every row through the stages, which are open while it lives.

    Args:
        options: The run's options.
        images: The stages before the engine.
        engine: The engine.
        store: The journal of results.
        progress: Counts what is finished.
    """

    def __init__(
        self, options: RunOptions, images: ImagePipeline, engine: ReplicaPool, store: ResultStore, progress: Progress
    ) -> None:
        self._options, self._images, self._engine = options, images, engine
        self._store, self._progress = store, progress
        self._slots = asyncio.Semaphore(MIN_IN_FLIGHT)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._intake: asyncio.Task[bool] | None = None
        self._all_admitted = False
        self._attempting = 0
        self._waiting = 0
        self._fewer_waiting = asyncio.Event()
        self._gave_up = asyncio.Event()
        self._suspects = PoisonBisector()
        self.stopped: BatchvlError | None = None
        """Why no more rows are admitted, once that is so."""

    async def run(self, read: ReadRows) -> None:
        """Process all rows, then those over which the engine died, in smaller and smaller groups.

        Returns early if stopped. Raises a BatchvlError if the run cannot continue.

        Args:
            read: Reads the rows of a set; None is all that are left.
        """
        watch = asyncio.create_task(self._watch_engine())
        exhausted = False
        try:
            passes = Passes(self._images, read, self._options.image.look_ahead)
            async with aclosing(passes.fetched()) as groups:
                while not exhausted and self.stopped is None:
                    exhausted = await self._run_phase(groups)
                    while suspects := self._suspects.next_group():
                        with self._engine.single_replica():
                            async with aclosing(self._images.fetch_ahead(_one_by_one(suspects), is_urgent=True)) as few:
                                await self._run_phase(few)
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)  # the rows have raised what it raises

    def stop(self, reason: BatchvlError, grace: float) -> int:
        """Admit no more rows, and give those inside the engines a limited time. May be called from a signal handler.

        Another call can only shorten the time.

        Args:
            reason: Why.
            grace: Seconds after which the engines are killed.

        Returns:
            The number of rows inside the engines.
        """
        asyncio.get_running_loop().call_later(grace, self._engine.kill, "the run is stopping")
        if self.stopped is None:
            self.stopped = reason
            if self._intake is not None:
                self._intake.cancel()
            for number, task in self._tasks.items():
                if not self._engine.holds(number):
                    task.cancel()
        return self._engine.in_flight

    async def _run_phase(self, groups: AsyncIterator[FetchedGroup]) -> bool:
        """Process rows until there are no more, or too many suspects. Return whether there are no more."""
        self._all_admitted = False
        self._gave_up.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._intake = intake = tasks.create_task(self._admit(groups, tasks))
        except BaseExceptionGroup as group:
            error = main_error(group)
            if self.stopped is not None and isinstance(error, EngineLost):
                error = self.stopped  # the engine was killed after its grace
            raise error from None
        if self.stopped is not None:
            self._suspects = PoisonBisector()  # the next run retries them
        poison, progress = self._suspects.split()
        for row in poison:
            self._fail_poison_row(row)
        if progress:
            self._engine.note_progress()
        return not intake.cancelled() and intake.result()

    async def _admit(self, groups: AsyncIterator[FetchedGroup], tasks: asyncio.TaskGroup) -> bool:
        """Start a task for each row as slots become free. Return False if it stopped because of the suspects."""
        async for group in groups:
            while self._waiting >= WAITING_ROWS:  # here, where no slot is held: the waiting rows need slots
                self._fewer_waiting.clear()
                await self._fewer_waiting.wait()
            for _ in group.rows:
                await self._slots.acquire()
            prepared = self._images.prepare_group(group)
            for row in group.rows:
                self._tasks[row.number] = tasks.create_task(self._process_row(row, prepared))
            if self._suspects.full:
                return False
        self._all_admitted = True
        return True

    async def _process_row(self, row: Row, prepared: SharedTask[PreparedGroup]) -> None:
        """Take one fetched row to the journal. Its slot and inline bytes are acquired."""
        started = time.monotonic()
        slot = Slot(self._slots)
        try:
            await self._store.wait_for_capacity()
            outcome, attempts = await self._attempt(row, prepared), 1
            if outcome.is_transient:
                outcome, attempts = await self._retry(row, outcome, slot)
                if outcome.is_transient and self.stopped is not None:
                    return  # the next run retries it
            if self._engine.info is None:
                await self._engine.started()  # if the engine refuses to start, nothing may be written
            self._finish(_record(row, outcome, attempts, time.monotonic() - started))
        except EngineExited as exited:
            self._suspects.record_death(row, exited)
        finally:
            slot.release()
            self._images.inline_budget.release(row.inline_bytes)
            del self._tasks[row.number]

    async def _attempt(self, row: Row, prepared: SharedTask[PreparedGroup]) -> Outcome:
        """Take a row through the stages after the fetch: prepare, engine. A failure in any of them is its response."""
        self._attempting += 1
        try:
            if row.failure is not None:
                return Outcome(Response(row.number, failure=row.failure), image_stubs(row))
            if not row.images and not self._engine.prepares_text:
                return Outcome(await self._engine.answer(self._images.request(row)))
            try:
                group = await prepared.get()
                request = group.requests[row.number]
                if isinstance(request, Failure):
                    return Outcome(Response(row.number, failure=request), group.images)
                return Outcome(await self._engine.answer(request), group.images)
            finally:
                prepared.release()
        except RowError as error:
            return Outcome(Response(row.number, failure=Failure.of(error)), image_stubs(row))
        except RowFailed as error:
            return Outcome(Response(row.number, failure=error.failure), error.images)
        finally:
            self._attempting -= 1

    async def _retry(self, row: Row, outcome: Outcome, slot: Slot) -> tuple[Outcome, int]:
        """Retry a row after a transient failure. While it waits, it holds neither a slot nor images.

        Returns:
            The last outcome, and the number of attempts including the first.
        """
        attempts = 1
        self._waiting += 1
        try:
            while outcome.is_transient and attempts <= self._options.engine.retries and self.stopped is None:
                slot.release()
                await self._pause(attempts)
                if self._gave_up.is_set():
                    return _give_up(outcome), attempts
                group = await self._images.fetch(row)  # before it takes a slot, as the other rows
                await slot.acquire()
                attempts += 1
                outcome = await self._attempt(row, self._images.prepare_group(group))
        finally:
            self._waiting -= 1
            self._fewer_waiting.set()
        return outcome, attempts

    async def _pause(self, retry: int) -> None:
        """Wait before a retry, or until rows are not to wait any more.

        Args:
            retry: 1-based number of the retry.
        """
        seconds = RETRY_SECONDS
        if retry > 1:
            seconds = random.uniform(0, min(MAX_RETRY_SECONDS, RETRY_SECONDS * 2 ** (retry - 2)))
        try:
            async with asyncio.timeout(seconds):
                await self._gave_up.wait()
        except TimeoutError:
            pass

    def _fail_poison_row(self, poison: PoisonRow) -> None:
        error = EngineCrashed(f"the engine died twice, the last time over this row alone: {poison.exited}")
        response = Response(poison.row.number, failure=Failure.of(error))
        self._finish(_record(poison.row, Outcome(response, image_stubs(poison.row)), poison.deaths, 0.0))

    def _finish(self, record: Record) -> None:
        self._store.add(record)
        self._progress.add_record(record)

    async def _watch_engine(self) -> None:
        """Admit as many rows as the engines hold, once they are up; give up on rows that keep them waiting."""
        info = await self._engine.started()
        slots = 2 * info.rows * info.replicas
        for _ in range(slots - MIN_IN_FLIGHT):
            self._slots.release()
        while True:
            await asyncio.sleep(1)
            idle_since = self._engine.idle_since
            if not self._all_admitted or self._attempting or idle_since is None:
                continue
            if time.monotonic() - idle_since > self._options.engine.max_idle_gpu:
                self._gave_up.set()


async def _one_by_one(rows: Iterable[Row]) -> AsyncIterator[list[Row]]:
    for row in rows:
        yield [row]


def _give_up(outcome: Outcome) -> Outcome:
    """Return the outcome of a row that is not retried any more, because only rows like it are left."""
    response, images = outcome
    cause = response.failure.message if response.failure is not None else ""
    error = GaveUpWaiting(f"gave up waiting for a retry; the last failure was: {cause}")
    return Outcome(Response(response.row, failure=Failure.of(error)), images)


def _record(row: Row, outcome: Outcome, attempts: int, seconds: float) -> Record:
    response = outcome.response
    return Record(
        row=row.number,
        id=row.id,
        status="ok" if response.failure is None else "failed",
        response=response.texts[-1] if response.texts and response.failure is None else None,
        responses=list(response.texts) if len(response.texts) > 1 else None,
        finish_reason=response.finish_reason,
        input_tokens=response.input_tokens,
        output_tokens=response.output_tokens,
        images=list(outcome.images),
        error=response.failure,
        attempts=attempts,
        seconds=seconds,
        kept=row.kept,
    )
