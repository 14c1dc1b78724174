"""The loop that joins the stages: row in, record out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence

import tenacity

from ..concurrency import SharedTask
from ..config.options import RunOptions
from ..errors import BatchvlError, EngineCrashed, EngineLost, GaveUpWaiting, RowError
from ..images.grouping import group_by_images
from ..images.pipeline import ImagePipeline, PreparedGroup, image_stubs
from ..images.worker_pool import RowFailed
from ..results import Record, ResultStore
from ..serving.exits import EngineExited
from ..serving.pool import ReplicaPool
from ..types import Failure, Image, Response, Row
from .poison import PoisonBisector, PoisonRow
from .progress import Progress

MIN_IN_FLIGHT = 256
"""Rows between manifest and journal, even for an engine that holds few."""
WAITING_ROWS = 4096
"""Rows that may wait for a retry before the intake waits for them."""


class Scheduler:
    """Answers rows; every stage is open while it lives. `stop` may be called from a signal handler."""

    def __init__(
        self, options: RunOptions, ahead: ImagePipeline, engine: ReplicaPool, output: ResultStore, progress: Progress
    ) -> None:
        self._options, self._ahead, self._engine = options, ahead, engine
        self._output, self._progress = output, progress
        self._slots = asyncio.Semaphore(MIN_IN_FLIGHT)
        self._inline = ahead.inline_budget
        self._waiting = 0
        self._fewer_wait = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._active = 0
        self._exhausted = False
        self._gave_up = asyncio.Event()
        self._suspects = PoisonBisector()
        self._intake: asyncio.Task[bool] | None = None
        self._taken_in = False
        self.stopped: BatchvlError | None = None
        """Why no new rows are taken, once that is so."""

    async def answer(self, rows: AsyncIterator[Row]) -> None:
        """Answers every row, then again those that the engine died over, in ever smaller groups.

        Returns early once stopped. Raises a BatchvlError where the run cannot go on.
        """
        watch = asyncio.create_task(self._watch())
        groups = group_by_images(rows, self._options.image.look_ahead)
        try:
            while not self._exhausted and self.stopped is None:
                self._exhausted = await self._phase(groups)
                while group := self._suspects.next_group():
                    with self._engine.single_replica():
                        await self._phase(_each(group))
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)  # what it raised, the rows were told as well

    def stop(self, reason: BatchvlError, grace: float) -> int:
        """Takes no new rows; those in the engine have `grace` seconds. Returns how many those are.

        Called again it can only shorten the time that is left.
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

    async def _phase(self, groups: AsyncIterator[list[Row]]) -> bool:
        """Rows until they end, which is True, or there are too many suspects; all have come out on return."""
        self._taken_in = False
        self._gave_up.clear()
        try:
            async with asyncio.TaskGroup() as tasks:
                self._intake = tasks.create_task(self._take_in(groups, tasks))
        except BaseExceptionGroup as group:
            error = _first(group)
            if self.stopped is not None and isinstance(error, EngineLost):
                error = self.stopped  # an engine that ends in its grace is what was asked for
            raise error from None
        if self.stopped is not None:
            self._suspects = PoisonBisector()  # the next run tries them again
        culprits, progress = self._suspects.sift()
        for culprit in culprits:
            self._condemn(culprit)
        if progress:
            self._engine.note_progress()
        return not self._intake.cancelled() and self._intake.result()

    async def _take_in(self, groups: AsyncIterator[list[Row]], tasks: asyncio.TaskGroup) -> bool:
        async for rows in groups:
            while self._waiting >= WAITING_ROWS:  # here, not with a slot in hand, which the waiting rows need
                self._fewer_wait.clear()
                await self._fewer_wait.wait()
            for row in rows:  # a slot for each before the first begins: none waits for one with pictures in hand
                await self._inline.acquire(row.inline_bytes)
                await self._slots.acquire()
            prepared = self._ahead.prepare_group(rows)
            for row in rows:
                self._tasks[row.number] = tasks.create_task(self._row(row, prepared))
            if self._suspects.full:
                return False
        self._taken_in = True
        return True

    async def _row(self, row: Row, prepared: SharedTask[PreparedGroup]) -> None:
        """One row from the manifest to the journal. Called with a slot taken."""
        started = time.monotonic()
        attempts = 1
        slot = True
        try:
            await self._output.wait_for_capacity()
            response, images = await self._attempt(row, prepared)
            if _may_pass(response) and self.stopped is not None:
                return  # the next run asks again
            if _may_pass(response) and self._options.engine.retries:
                self._slots.release()
                slot = False
                self._waiting += 1
                try:
                    attempts, response, images = await self._again(row, response, images)
                finally:
                    self._waiting -= 1
                    self._fewer_wait.set()
                if _may_pass(response) and self.stopped is not None:
                    return
            if self._engine.info is None:
                await self._engine.started()  # were it refused, nothing would have been run, and nothing be written
            self._finish(_record(row, response, images, attempts, time.monotonic() - started))
        except EngineExited as died:
            self._suspects.blame(row, died)
        finally:
            if slot:
                self._slots.release()
            self._inline.release(row.inline_bytes)
            del self._tasks[row.number]

    async def _attempt(self, row: Row, prepared: SharedTask[PreparedGroup]) -> tuple[Response, tuple[Image, ...]]:
        """The way of a row, stage by stage. A failure in any of them is its response."""
        self._active += 1
        try:
            if row.failure is not None:
                return Response(row.number, failure=row.failure), image_stubs(row)
            if not row.images and not self._engine.prepares_text:
                return await self._engine.answer(self._ahead.request(row)), ()
            try:
                found = await prepared.get()
                ready = found.requests[row.number]
                if isinstance(ready, Failure):
                    return Response(row.number, failure=ready), found.images
                return await self._engine.answer(ready), found.images
            finally:
                prepared.release()
        except RowError as error:
            return Response(row.number, failure=Failure.of(error)), image_stubs(row)
        except RowFailed as failed:
            return Response(row.number, failure=failed.failure), failed.images
        finally:
            self._active -= 1

    async def _again(
        self, row: Row, response: Response, images: tuple[Image, ...]
    ) -> tuple[int, Response, tuple[Image, ...]]:
        """Asks a row again after a failure that may pass. While it waits it holds nothing but itself."""
        attempts = 1
        retrying = tenacity.AsyncRetrying(
            sleep=self._wait,
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=60),
            stop=tenacity.stop_after_attempt(self._options.engine.retries),
            retry=tenacity.retry_if_result(lambda answer: _may_pass(answer[0]) and self.stopped is None),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )

        async def again() -> tuple[Response, tuple[Image, ...]]:
            nonlocal attempts
            if self._gave_up.is_set():
                assert response.failure is not None
                text = f"given up while it waited for a retry; its failure was: {response.failure.message}"
                return Response(row.number, failure=Failure.of(GaveUpWaiting(text))), images
            attempts += 1
            async with self._slots:
                return await self._attempt(row, self._ahead.prepare_group([row]))

        await self._wait(0.5)
        response, images = await retrying(again)
        return attempts, response, images

    async def _wait(self, seconds: float) -> None:
        """A row's pause before a retry, which ends early when no more retries are wanted."""
        try:
            async with asyncio.timeout(seconds):
                await self._gave_up.wait()
        except TimeoutError:
            pass

    def _condemn(self, culprit: PoisonRow) -> None:
        row, died, deaths = culprit
        failure = Failure.of(EngineCrashed(f"twice, the last time over this row alone: {died}"))
        self._finish(_record(row, Response(row.number, failure=failure), image_stubs(row), deaths, 0.0))

    def _finish(self, record: Record) -> None:
        self._output.add(record)
        self._progress.answered(record)

    async def _watch(self) -> None:
        """Widens the intake to what the engines hold, and lets go of stragglers that keep it waiting."""
        info = await self._engine.started()
        room = 2 * info.rows * info.replicas + self._options.fetch.fetch_concurrency
        for _ in range(room - MIN_IN_FLIGHT):
            self._slots.release()
        while True:
            await asyncio.sleep(1)
            idle = self._engine.idle_since
            if self._taken_in and not self._active and idle is not None:
                longest = self._options.engine.max_idle_gpu
                if time.monotonic() - idle > longest:
                    self._gave_up.set()


async def _each(rows: Iterable[Row]) -> AsyncIterator[list[Row]]:
    for row in rows:
        yield [row]


def _may_pass(response: Response) -> bool:
    """Whether asking the engine again may help. Fetching has its own retries, at the place where they can wait."""
    return response.failure is not None and response.failure.retryable and response.failure.stage == "engine"


def _record(row: Row, response: Response, images: Sequence[Image], attempts: int, seconds: float) -> Record:
    return Record(
        row=row.number,
        id=row.id,
        status="ok" if response.failure is None else "failed",
        response=response.texts[-1] if response.texts and response.failure is None else None,
        responses=list(response.texts) if len(response.texts) > 1 else None,
        finish_reason=response.finish_reason,
        input_tokens=response.input_tokens,
        output_tokens=response.output_tokens,
        images=list(images),
        error=response.failure,
        attempts=attempts,
        seconds=seconds,
        kept=row.kept,
    )


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The error that a group of tasks ended with: ours, if there is one."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if isinstance(error, BatchvlError)), leaves[0])


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
