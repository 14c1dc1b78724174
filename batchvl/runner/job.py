"""A run, from its options to its summary: what is opened in which order, and what the end means."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from .._version import __version__
from ..concurrency import run_sync
from ..config.options import RunOptions, flag
from ..config.sources import resolve_options
from ..config.units import Shard, parse_failure_limit, pluralize
from ..engines.registry import ENGINE_TYPES, choose_engine, engine_spec
from ..errors import BatchvlError, EngineLost, ResumeError, StoppedEarly, TooManyFailures, UsageError
from ..hardware.gpus import assign_gpus
from ..images.files import check_roots
from ..images.pipeline import ImagePipeline
from ..ipc.spawn import ParentPipe
from ..manifest import Manifest
from ..prompts.prompter import Prompter
from ..results import Counts, ResultStore, RetrySelection, RunFile, merge
from ..results.location import default_output, open_output
from ..results.lock import HEARTBEAT_SECONDS
from ..serving.pool import ReplicaPool
from ..storage.disk import Disk
from ..types import Row
from .progress import Progress, log_to
from .scheduler import Scheduler
from .signals import Stopper
from .summary import EngineUse, Summary, summarise

logger = logging.getLogger(__name__)

MIN_RATE_ROWS = 100
"""Rows before a percentage of failures counts, if the length of the manifest is unknown."""


def run(
    manifest: str | os.PathLike[str] | None = None, *, config: str | None = None, quiet: bool = False, **options: Any
) -> Summary:
    """Answer the rows of a manifest, as `batchvl run` does.

    Args:
        manifest: The manifest: a file, a directory of images, or a glob pattern.
        config: The TOML job file; by default `batchvl.toml` next to the manifest, if there is one.
        quiet: Whether to show no progress.
        **options: The options of the command, with underscores. Others come from `BATCHVL_*` variables, the job file
            and the defaults.

    Returns:
        The summary. If the run ended early or rows failed, its `exit_code` and `message` say so.

    Raises:
        BatchvlError: Nothing could be run.

    Example:
        summary = batchvl.run("manifest.parquet", model="shapes")
        print(summary.ok, "answers in", summary.results)
    """
    return Job(*resolve_options(manifest, config, options), quiet=quiet).run()


class Stages(NamedTuple):
    """The open stages of a run."""

    manifest: Manifest
    images: ImagePipeline
    engine: ReplicaPool
    progress: Progress


class RunObserver:
    """Observes a run. Override what you need."""

    def on_engine_up(self, stages: Stages) -> None:
        """Handle that the engine has loaded its model."""

    def on_commit(self, committed: Counts) -> None:
        """Handle that rows are on disk.

        Args:
            committed: Counts of all rows that this run has committed.
        """

    async def on_answered(self, stages: Stages) -> None:
        """Handle that all rows are answered. The stages stay open until this returns."""


class Job:
    """The settings of a run of one shard, checked as far as that is possible without starting anything.

    Args:
        source: The manifest, as the user names it.
        options: All options.
        quiet: Whether to show no progress.
        retry: The failed rows to retry. By default, the rows that have no result yet are answered.
        disk: Writes the results.
        observer: Observes the run.

    Raises:
        OptionError: An option is wrong.
    """

    def __init__(
        self,
        source: str,
        options: RunOptions,
        *,
        quiet: bool = False,
        retry: RetrySelection | None = None,
        disk: Disk | None = None,
        observer: RunObserver | None = None,
    ) -> None:
        engine: Any = choose_engine(options.engine.engine, options.engine.device)
        self.options = options = replace(options, engine=replace(options.engine, engine=engine))
        self.source, self.quiet, self.retry, self.disk = source, quiet, retry, disk
        self.observer = observer or RunObserver()
        self.shard = options.manifest.shard
        self.output = open_output(options.output.output or default_output(source), options.output.work)
        self.spec = engine_spec(options)
        self.gpu_assignments = assign_gpus(options, ENGINE_TYPES[engine].gpus_per_replica(options))
        for name in ("accept_failures", "max_failures"):
            parse_failure_limit(getattr(options.output, name) or "0", 0, flag(name))
        check_roots(options.fetch.image_root)

    def run(self) -> Summary:
        """Run to the end, or to the first reason to stop. Raises a BatchvlError if nothing could be run.

        Blocks. If this thread already has a running event loop, as in a notebook, the run gets a thread of its own.
        """
        manifest = Manifest.open(self.source, self.options.manifest, self.options.prompt)
        manifest.check()
        execution = _Execution(self, manifest)
        return run_sync(execution.run, execution.stopper.interrupt)


class _Execution:
    """One execution of a job."""

    def __init__(self, job: Job, manifest: Manifest) -> None:
        self._job, self._options, self._manifest = job, job.options, manifest
        self._total = manifest.total
        self._scheduler: Scheduler | None = None
        self._engine_use = EngineUse()
        self.stopper = Stopper(job.options.output.grace)

    async def run(self) -> Summary:
        """Run the job. Raises a BatchvlError if nothing could be run."""
        job, manifest = self._job, self._manifest
        is_new = not job.output.path.exists()
        run_file = RunFile(
            manifest.fingerprint,
            self._options.meaning(),
            job.shard.count,
            manifest.schema.id_type,
            manifest.schema.kept,
            job.source,
            manifest.total,
        )
        self._store = ResultStore.open(
            job.output,
            run_file,
            job.shard,
            options=self._options.output,
            on_commit=self._on_commit,
            retry=job.retry,
            disk=job.disk,
        )
        self._before = self._store.counts
        self._progress = Progress(self._expected, self._before, quiet=job.quiet)
        with log_to(self._progress.write), self.stopper.listen():
            error = await self._answer_and_close()
            if isinstance(error, UsageError | EngineLost):
                with suppress(OSError):  # report the error that led here instead
                    self._store.roll_back(logs=isinstance(error, EngineLost))
            if isinstance(error, UsageError):
                if is_new:
                    with suppress(OSError):
                        job.output.path.rmdir()
                raise error
            return await self._finish(error)

    async def _answer_and_close(self) -> BatchvlError | None:
        """Answer the rows that are left, and close the store. Return why the end was not reached, if it was not."""
        if self._store.retry_rows is not None:
            logger.info(f"retrying {pluralize(len(self._store.retry_rows), 'failed row')}")
        if (after := self._options.output.stop_after) is not None:
            self.stopper.stop_after(after, f"--stop-after {after}")
        error: BatchvlError | None = None
        ended = False
        try:
            if not self._is_done():
                await self._answer()
            ended = True
        except asyncio.CancelledError:
            if self.stopper.reason is None:
                raise
            error = self.stopper.reason
        except BatchvlError as raised:
            error = raised
        finally:
            try:
                await self._store.close(ended and self._options.manifest.limit is None, self._total)
            except (StoppedEarly, ResumeError) as raised:
                error = error or raised
            self._progress.close()
        return error

    def _is_done(self) -> bool:
        """Return whether earlier runs left nothing to do, so that no engine is needed."""
        store, limit = self._store, self._options.manifest.limit
        if store.retry_rows is not None:
            return not len(store.retry_rows)
        if (
            limit is not None
            and self._job.shard.count == 1
            and store.counts.rows >= limit
            and store.done.count(range(limit)) == limit
        ):
            self._total = limit  # a limited run of a text manifest does not reach its end
            return True
        if store.complete:
            self._total = store.total
            return True
        return False

    async def _answer(self) -> None:
        """Open every stage, answer all rows, and close the stages. Raises the reason if the run was stopped."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a run needs a task")
        async with AsyncExitStack() as stack:
            with self.stopper.cancel_task(task):
                stages = await stack.enter_async_context(self._open_stages())
            scheduler = Scheduler(self._options, stages.images, stages.engine, self._store, self._progress)
            describing = asyncio.create_task(self._describe(stages, scheduler))
            try:
                with self.stopper.stage(lambda reason, grace: _stop(scheduler, reason, grace)):
                    self._scheduler = scheduler
                    await scheduler.run(self._rows())
                    if scheduler.stopped is None:
                        await self._job.observer.on_answered(stages)
            finally:
                self._scheduler = None
                describing.cancel()
                await asyncio.gather(describing, return_exceptions=True)  # the rows have raised what it raises
                engine = stages.engine
                self._engine_use = EngineUse(
                    self._engine_use.info, engine.seconds, engine.wait_share, engine.deaths, engine.recycled
                )
                self._progress.add_stage_time("engine", engine.row_seconds)
        if scheduler.stopped is not None:
            raise scheduler.stopped

    @asynccontextmanager
    async def _open_stages(self) -> AsyncIterator[Stages]:
        """Open the stages between manifest and results. The model is loaded in the background."""
        job, options, store = self._job, self._options, self._store
        async with AsyncExitStack() as stack:
            parent_pipe = ParentPipe()
            stack.callback(parent_pipe.close)
            stack.callback(asyncio.create_task(self._progress.tick()).cancel)
            stack.callback(asyncio.create_task(self._heartbeat()).cancel)
            images = await stack.enter_async_context(
                ImagePipeline(
                    options.fetch,
                    options.image,
                    [self._manifest.directory, *map(Path, options.fetch.image_root)],
                    log=store.directory / f"images-{store.attempt:04d}.log",
                    preload=ENGINE_TYPES[job.spec.engine].preload,
                    replicas=len(job.gpu_assignments),
                    on_stage_seconds=self._progress.add_stage_time,
                )
            )
            engine = await stack.enter_async_context(
                ReplicaPool(
                    job.spec,
                    options.engine,
                    job.gpu_assignments,
                    images.tensors,
                    parent_pipe,
                    dict(os.environ),
                    store.directory / f"engine-{store.attempt:04d}.log",
                )
            )
            special_tokens = engine.preparation.special_tokens if engine.preparation else ()
            prompter = Prompter(options.prompt, options.sampling, special_tokens)
            await images.load(engine.preparation, prompter.request)
            yield Stages(self._manifest, images, engine, self._progress)

    async def _describe(self, stages: Stages, scheduler: Scheduler) -> None:
        """Once the engine is up, record what it is in the results' metadata."""
        engine = stages.engine
        info = await engine.started()
        if info.model == self._job.spec.model:
            info = msgspec.structs.replace(info, model=self._options.model.model)  # "shapes", not its path here
        self._engine_use = EngineUse(info)
        self._progress.engine_up(lambda: engine.wait_share)
        metadata = {
            "batchvl": __version__,
            "engine": msgspec.json.encode(info).decode(),
            "id_column": self._options.manifest.id_column,
        }
        try:
            self._store.describe(metadata)
        except StoppedEarly as error:
            scheduler.stop(error, self._options.output.grace)
            return
        logger.info(f"{info}, batches of {pluralize(info.batch_size)}")
        for note in info.notes:
            logger.info(f"note: {note}")
        self._job.observer.on_engine_up(stages)

    async def _heartbeat(self) -> None:
        """Show in the output that the runner is alive, since no rows may be committed for minutes. Runs for ever."""
        while True:
            total = self._total if self._total is not None else self._manifest.estimate()
            await asyncio.to_thread(self._store.heartbeat, total)  # a thread, since a failing disk may block
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _rows(self) -> AsyncIterator[Row]:
        """Yield the shard's rows that are not done. A thread reads one chunk ahead."""
        loop, retry_rows = asyncio.get_running_loop(), self._store.retry_rows
        # The run that is retried may have had a --limit, and other shards because of it.
        shard, stop = (self._job.shard, None) if retry_rows is None else (Shard(), retry_rows.stop)
        with ThreadPoolExecutor(1, "batchvl-manifest") as reader:
            chunks = self._manifest.rows(shard, self._store.done, self._job.output.path)
            next_chunk = loop.run_in_executor(reader, next, chunks, None)
            while (chunk := await next_chunk) is not None:
                next_chunk = loop.run_in_executor(reader, next, chunks, None)
                for row in chunk:
                    if stop is not None and row.number >= stop:
                        return
                    yield row
        limit = self._options.manifest.limit
        self._total = limit if self._manifest.total is None and limit is not None else self._manifest.total

    def _expected(self) -> int | None:
        """Return the number of rows in the shard, as far as it is known; of a retry, those that have a result."""
        if self._store.retry_rows is not None:
            return self._before.rows + len(self._store.retry_rows)
        total = self._total if self._total is not None else self._manifest.estimate()
        return None if total is None else len(self._job.shard.rows(total))

    def _on_commit(self, counts: Counts) -> None:
        self._progress.commit(counts)
        self._job.observer.on_commit(self._progress.committed)
        if counts.failures:
            self._check_max_failures()

    def _check_max_failures(self) -> None:
        """Stop the run if more rows failed than --max-failures allows."""
        limit, total = self._options.output.max_failures, self._total
        if limit is None or self._scheduler is None:
            return
        failed = self._before.failures + self._progress.committed.failures
        done = self._before.rows + self._progress.committed.rows
        if total is None and "%" in limit and done < MIN_RATE_ROWS:
            return
        if failed > parse_failure_limit(limit, done if total is None else len(self._job.shard.rows(total))):
            causes = self._progress.leading_failures()
            text = f"stopped: {failed} of {done} rows failed, more than --max-failures {limit} ({causes})"
            self._scheduler.stop(TooManyFailures(text), self._options.output.grace)

    async def _finish(self, error: BatchvlError | None) -> Summary:
        """Merge the results if this run is all there is, and write the summary."""
        results = None
        if self._job.shard.count == 1 and error is None:
            results, error = await self._merge()
        knows_expected = self._total is not None or self._job.retry is not None
        summary = summarise(
            self._progress,
            self._before,
            self._engine_use,
            manifest=self._job.source,
            output=str(self._job.output),
            expected=self._expected() if knows_expected else None,
            results=results,
        )
        summary.exit_code, summary.message = self._verdict(error, summary)
        await self._write_summary(summary)
        return summary

    async def _merge(self) -> tuple[str | None, BatchvlError | None]:
        """Merge the results. Return the merged file, or why there is none."""
        total = self._total if self._job.retry is None else None  # the run that is retried may have had a --limit
        try:
            report = await asyncio.to_thread(merge, self._job.output, None, total, disk=self._job.disk)
        except UsageError as error:  # not the user's mistake: the output was writable until now
            return None, StoppedEarly(f"{error}: run the same command again to resume")
        except BatchvlError as error:
            return None, error
        if report.complete:
            return str(report.file), None
        if self._job.retry is not None:
            rows = f"{report.missing:,} rows" if report.missing else "some rows"
            logger.info(f"{rows} have no result yet: batchvl run answers them")
            return None, None
        verb = "has" if report.missing == 1 else "have"  # a bug, if it happens; never report it as success
        return None, BatchvlError(f"{pluralize(report.missing)} {verb} no result: run the same command again")

    def _verdict(self, error: BatchvlError | None, summary: Summary) -> tuple[int, str]:
        """Return the exit code, and the reason for it if it is not 0."""
        accepted = self._options.output.accept_failures
        if error is not None:
            return error.exit_code, str(error)
        expected = summary.expected
        if self._options.manifest.limit is None and expected is not None and summary.rows < expected:
            missing = pluralize(expected - summary.rows)
            return 1, f"{missing} missing, although the run reached its end: run the same command again"
        if summary.failed > parse_failure_limit(accepted, summary.rows):
            return 3, f"more rows failed than --accept-failures {accepted} allows"
        return 0, ""

    async def _write_summary(self, summary: Summary) -> None:
        output, shard = self._job.output, self._job.shard
        file = (output.path if shard.count == 1 else output.shard(shard).path) / "summary.json"
        if not self._progress.committed.rows and summary.already_recorded(file):
            return  # keep the summary of the run that did the work
        try:
            summary.write(file)
            await asyncio.to_thread(output.upload, file, str(file.relative_to(output.path)))
        except OSError as error:
            logger.warning(f"cannot write {error.filename or file}: {error.strerror}")


def _stop(scheduler: Scheduler, reason: BatchvlError, grace: float) -> str:
    """Stop the scheduler. Return what happens now, for the log."""
    rows = scheduler.stop(reason, grace)
    if not rows:
        return "no new rows, and none in the engine"
    return f"no new rows; {pluralize(rows)} in the engine {'has' if rows == 1 else 'have'} {grace:g} s to finish"
