"""What a run and a fetch have in common: rows of a manifest become records, in attempts that can be stopped.

An execution opens the output, leaves the rows to a processor, closes the output, and says what the end means.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ..config.options import RunOptions, flag
from ..config.units import Shard, parse_failure_limit, pluralize
from ..errors import BatchvlError, EngineLost, ResumeError, StoppedEarly, TooManyFailures, UsageError
from ..images.files import check_roots
from ..images.pipeline import ImagePipeline
from ..manifest import Manifest
from ..results import Counts, ResultStore, RetrySelection, RunFile, merge
from ..results.lock import HEARTBEAT_SECONDS
from ..results.output import Storage
from ..results.rowset import RowSet
from ..storage.disk import Disk
from ..types import Row
from .passes import ReadRows
from .progress import Progress, log_to
from .signals import Stopper
from .summary import Ending

logger = logging.getLogger(__name__)

MIN_RATE_ROWS = 100
"""Rows before a percentage of failures counts, if the length of the manifest is unknown."""

S = TypeVar("S", bound=Ending)


def ignore_commit(committed: Counts) -> None:
    """Do nothing about rows that are on disk."""


@dataclass(frozen=True)
class Task:
    """What to do: the rows of one shard of a manifest into an output."""

    source: str
    """The manifest, as the user names it."""
    options: RunOptions
    output: Storage
    quiet: bool = False
    """Whether to show no progress."""
    retry: RetrySelection | None = None
    """The failed rows to retry. By default, the rows that have no result yet are processed."""
    disk: Disk | None = None
    """Writes the results."""
    on_commit: Callable[[Counts], object] = ignore_commit
    """Called with the counts of all rows that were committed, after each commit."""

    @property
    def shard(self) -> Shard:
        return self.options.manifest.shard

    def check(self) -> None:
        """Check the limits of failures and the image roots. Raises OptionError."""
        for name in ("accept_failures", "max_failures"):
            parse_failure_limit(getattr(self.options.output, name) or "0", 0, flag(name))
        check_roots(self.options.fetch.image_root)


class Processor(Protocol):
    """Takes rows through the stages."""

    stopped: BatchvlError | None
    """Why no more rows are admitted, once that is so."""

    async def run(self, read: ReadRows) -> None:
        """Process all rows. Returns early if stopped. Raises a BatchvlError if it cannot continue."""

    def stop(self, reason: BatchvlError, grace: float) -> int:
        """Admit no more rows, and return how many get `grace` seconds to finish."""


class Execution(ABC, Generic[S]):
    """One execution of a task. `run` may be called once.

    Args:
        task: What to do.
        manifest: The manifest, checked.
    """

    progress: Progress
    store: ResultStore

    def __init__(self, task: Task, manifest: Manifest) -> None:
        self.task, self.options, self.manifest = task, task.options, manifest
        self.total = manifest.total
        """Rows of the manifest, once they are counted."""
        self.stopper = Stopper(task.options.output.grace)
        self._processor: Processor | None = None

    @abstractmethod
    def run_file(self) -> RunFile:
        """Return what identifies the output."""

    @abstractmethod
    def make_progress(self, before: Counts) -> Progress:
        """Return the counts of this execution.

        Args:
            before: Counts of the rows that earlier executions finished.
        """

    @abstractmethod
    async def process(self) -> None:
        """Open every stage, process all rows that are left, and close the stages.

        Raises the reason if the execution was stopped.
        """

    @abstractmethod
    def summarise(self, expected: int | None, results: str | None) -> S:
        """Return the summary, as of an execution that reached its end.

        Args:
            expected: Rows of the shard, if known.
            results: The merged file, if there is one.
        """

    @abstractmethod
    def describe_stop(self, left: int, grace: float) -> str:
        """Return what happens once no more rows are admitted, for the log.

        Args:
            left: Number of rows that get time to finish.
            grace: This time in seconds.
        """

    def opened(self) -> None:
        """Handle that the output is open. Raises StoppedEarly or ResumeError."""

    async def run(self) -> S:
        """Run to the end, or to the first reason to stop. Raises a BatchvlError if nothing could be run."""
        task = self.task
        is_new = not task.output.path.exists()
        self.store = ResultStore.open(
            task.output,
            self.run_file(),
            task.shard,
            options=self.options.output,
            on_commit=self._on_commit,
            retry=task.retry,
            disk=task.disk,
        )
        self.progress = self.make_progress(self.store.counts)
        with log_to(self.progress.write), self.stopper.listen():
            error = await self._process_and_close()
            if isinstance(error, UsageError | EngineLost):
                with suppress(OSError):  # report the error that led here instead
                    self.store.roll_back(logs=isinstance(error, EngineLost))
            if isinstance(error, UsageError):
                if is_new:
                    with suppress(OSError):
                        task.output.path.rmdir()
                raise error
            return await self._finish(error)

    async def _process_and_close(self) -> BatchvlError | None:
        """Process the rows that are left, and close the store. Return why the end was not reached, if it was not."""
        if self.store.retry_rows is not None:
            logger.info(f"retrying {pluralize(len(self.store.retry_rows), 'failed row')}")
        for note in self.manifest.notes:
            logger.info(note)
        if (after := self.options.output.stop_after) is not None:
            self.stopper.stop_after(after, f"--stop-after {after}")
        error: BatchvlError | None = None
        ended = False
        try:
            self.opened()
            if not self._is_done():
                await self.process()
            ended = True
        except asyncio.CancelledError:
            if self.stopper.reason is None:
                raise
            error = self.stopper.reason
        except BatchvlError as raised:
            error = raised
        finally:
            try:
                await self.store.close(ended and self.options.manifest.limit is None, self.total)
            except (StoppedEarly, ResumeError) as raised:
                error = error or raised
            self.progress.close()
        return error

    def _is_done(self) -> bool:
        """Return whether earlier executions left nothing to do, so that no stage is needed."""
        store, limit = self.store, self.options.manifest.limit
        if store.retry_rows is not None:
            return not len(store.retry_rows)
        if (
            limit is not None
            and self.task.shard.count == 1
            and store.counts.rows >= limit
            and store.done.count(range(limit)) == limit
        ):
            self.total = limit  # a limited run of a text manifest does not reach its end
            return True
        if store.complete:
            self.total = store.total
            return True
        return False

    @contextmanager
    def stoppable(self, processor: Processor) -> Iterator[None]:
        """Let signals, time limits and --max-failures stop the processor inside the `with`."""
        with self.stopper.stage(lambda reason, grace: self.describe_stop(processor.stop(reason, grace), grace)):
            self._processor = processor
            try:
                yield
            finally:
                self._processor = None

    async def open_images(self, stack: AsyncExitStack, **settings: Any) -> ImagePipeline:
        """Open the stages that fetch and prepare images, and show from now on that this process is alive.

        Args:
            stack: Closes them.
            settings: Further arguments of `ImagePipeline`.
        """
        options, store = self.options, self.store
        stack.callback(asyncio.create_task(self.progress.tick()).cancel)
        stack.callback(asyncio.create_task(self.heartbeat()).cancel)
        return await stack.enter_async_context(
            ImagePipeline(
                options.fetch,
                options.image,
                [self.manifest.directory, *map(Path, options.fetch.image_root)],
                log=store.directory / f"images-{store.attempt:04d}.log",
                **settings,
            )
        )

    async def heartbeat(self) -> None:
        """Show in the output that this process is alive, since no rows may be committed for minutes. Runs for ever."""
        while True:
            total = self.total if self.total is not None else self.manifest.estimate()
            await asyncio.to_thread(self.store.heartbeat, total)  # a thread, since a failing disk may block
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def rows(self, only: RowSet | None) -> AsyncIterator[Row]:
        """Yield the shard's rows that are not done, or only some rows. A thread reads one chunk ahead."""
        loop, retry_rows = asyncio.get_running_loop(), self.store.retry_rows
        # The run that is retried may have had a --limit, and other shards because of it.
        shard, stop = (self.task.shard, None) if retry_rows is None else (Shard(), retry_rows.stop)
        skip = self.store.done
        if only is not None:
            stop = only.stop
            skip = RowSet.below(stop) - only
        with ThreadPoolExecutor(1, "batchvl-manifest") as reader:
            chunks = self.manifest.rows(shard, skip, self.task.output.path)
            next_chunk = loop.run_in_executor(reader, next, chunks, None)
            while (chunk := await next_chunk) is not None:
                next_chunk = loop.run_in_executor(reader, next, chunks, None)
                for row in chunk:
                    if stop is not None and row.number >= stop:
                        return
                    yield row
        limit = self.options.manifest.limit
        self.total = limit if self.manifest.total is None and limit is not None else self.manifest.total

    def expected(self) -> int | None:
        """Return the number of rows in the shard, as far as it is known; of a retry, those that have a result."""
        if self.store.retry_rows is not None:
            return self.store.counts.rows + len(self.store.retry_rows)
        total = self.total if self.total is not None else self.manifest.estimate()
        return None if total is None else len(self.task.shard.rows(total))

    def _on_commit(self, counts: Counts) -> None:
        self.progress.commit(counts)
        self.task.on_commit(self.progress.committed)
        if counts.failures:
            self._check_max_failures()

    def _check_max_failures(self) -> None:
        """Stop if more rows failed than --max-failures allows."""
        limit, total, before = self.options.output.max_failures, self.total, self.store.counts
        if limit is None or self._processor is None:
            return
        failed = before.failures + self.progress.committed.failures
        done = before.rows + self.progress.committed.rows
        if total is None and "%" in limit and done < MIN_RATE_ROWS:
            return
        if failed > parse_failure_limit(limit, done if total is None else len(self.task.shard.rows(total))):
            causes = self.progress.leading_failures()
            text = f"stopped: {failed} of {done} rows failed, more than --max-failures {limit} ({causes})"
            self._processor.stop(TooManyFailures(text), self.options.output.grace)

    async def _finish(self, error: BatchvlError | None) -> S:
        """Merge the results if this execution is all there is, and write the summary."""
        results = None
        if self.task.shard.count == 1 and error is None:
            results, error = await self._merge()
        knows_expected = self.total is not None or self.task.retry is not None
        summary = self.summarise(self.expected() if knows_expected else None, results)
        summary.exit_code, summary.message = self._verdict(error, summary)
        await self._write_summary(summary)
        return summary

    async def _merge(self) -> tuple[str | None, BatchvlError | None]:
        """Merge the results. Return the merged file, or why there is none."""
        total = self.total if self.task.retry is None else None  # the run that is retried may have had a --limit
        try:
            report = await asyncio.to_thread(merge, self.task.output, None, total, disk=self.task.disk)
        except UsageError as error:  # not the user's mistake: the output was writable until now
            return None, StoppedEarly(f"{error}: run the same command again to resume")
        except BatchvlError as error:
            return None, error
        if report.complete:
            return str(report.file), None
        if self.task.retry is not None:
            rows = f"{report.missing:,} rows" if report.missing else "some rows"
            logger.info(f"{rows} have no result yet: the command without a retry goes on with them")
            return None, None
        verb = "has" if report.missing == 1 else "have"  # a bug, if it happens; never report it as success
        return None, BatchvlError(f"{pluralize(report.missing)} {verb} no result: run the same command again")

    def _verdict(self, error: BatchvlError | None, summary: S) -> tuple[int, str]:
        """Return the exit code, and the reason for it if it is not 0."""
        accepted = self.options.output.accept_failures
        if error is not None:
            return error.exit_code, str(error)
        expected = summary.expected
        if self.options.manifest.limit is None and expected is not None and summary.rows < expected:
            missing = pluralize(expected - summary.rows)
            return 1, f"{missing} missing, although the run reached its end: run the same command again"
        if summary.failed > parse_failure_limit(accepted, summary.rows):
            return 3, f"more rows failed than --accept-failures {accepted} allows"
        return 0, ""

    async def _write_summary(self, summary: S) -> None:
        output, shard = self.task.output, self.task.shard
        file = (output.path if shard.count == 1 else output.shard(shard).path) / "summary.json"
        if not self.progress.committed.rows and summary.already_recorded(file):
            return  # keep the summary of the run that did the work
        try:
            summary.write(file)
            await asyncio.to_thread(output.upload, file, str(file.relative_to(output.path)))
        except OSError as error:
            logger.warning(f"cannot write {error.filename or file}: {error.strerror}")
