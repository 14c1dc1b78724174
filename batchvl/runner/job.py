"""A run from its options to its summary: what is opened, in which order, and what its end means."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from .._version import __version__
from ..concurrency import run_sync
from ..config.options import RunOptions, flag
from ..config.sources import resolve_options
from ..config.units import Shard, parse_failure_limit, pluralize
from ..engines.base import EngineInfo
from ..engines.registry import ENGINE_TYPES, choose_engine, engine_spec
from ..errors import BatchvlError, EngineLost, ResumeError, StoppedEarly, TooManyFailures, UsageError
from ..hardware.gpus import assign_gpus
from ..hardware.slurm import kill_wait
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
from .signals import handle_signals
from .summary import Summary, summarise

logger = logging.getLogger(__name__)

WRITING_SECONDS = 5.0
"""Of what Slurm leaves before it kills, for writing what was answered."""
_RATE_ROWS = 100
"""Rows before a share of failures means anything where the manifest's length is not known."""


def run(
    manifest: str | os.PathLike[str] | None = None, *, config: str | None = None, quiet: bool = False, **options: Any
) -> Summary:
    """Answers a manifest's rows and returns the summary; what `batchvl run` does.

    Options are the command's, with underscores; what is not given comes from `BATCHVL_*` variables, the TOML file
    `config` (else `batchvl.toml` beside the manifest) and the defaults. Raises a BatchvlError where nothing could be
    run; a run that ended early, or with failed rows, tells so by the summary's `exit_code` and `message`.

    Example:

        summary = batchvl.run("manifest.parquet", model="shapes")
        print(summary.ok, "answers in", summary.results)
    """
    return Job(*resolve_options(manifest, config, options), quiet=quiet).run()


class Job:
    """One run of one shard of a manifest."""

    def __init__(
        self, source: str, options: RunOptions, *, quiet: bool = False, retry: RetrySelection | None = None,
        disk: Disk | None = None,
    ) -> None:  # fmt: skip
        """retry: which rows to ask again, instead of those that have not been asked. disk: what the output is written
        by, for tests that fail or kill there. Raises OptionError.
        """
        engine: Any = choose_engine(options.engine.engine, options.engine.device)
        self.options = options = replace(options, engine=replace(options.engine, engine=engine))
        self.source, self.quiet, self.retry, self.shard = source, quiet, retry, options.manifest.shard
        self.out, self._disk = open_output(options.output.output or default_output(source), options.output.work), disk
        self.folder = self.out.path
        self.spec = engine_spec(options)
        self.places = assign_gpus(options, ENGINE_TYPES[engine].gpus_per_replica(options))
        for name in ("accept_failures", "max_failures"):
            parse_failure_limit(getattr(options.output, name) or "0", 0, flag(name))
        check_roots(options.fetch.image_root)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._opening: asyncio.Task[Any] | None = None
        self._runner: Scheduler | None = None
        self._stopped: BatchvlError | None = None
        self._engine: EngineInfo | None = None
        self._engine_seconds, self._gpu_wait, self._engine_deaths, self._engine_restarts = 0.0, 0.0, 0, 0
        self._total: int | None = None
        self._again = 0  # rows that are asked again
        self._kill_wait: float | None = None
        self._grace: float = options.output.grace  # on an interrupt

    def run(self) -> Summary:
        """Runs to the end or to the first reason to stop. Raises a BatchvlError where nothing could be run.

        Blocks. Where this thread has a running loop already, as in a notebook, the run has a thread of its own.
        """
        self.manifest = Manifest.open(self.source, self.options.manifest, self.options.prompt)
        self.manifest.check()
        self._total = self.manifest.total
        return run_sync(self._run, self._interrupt)

    async def _run(self) -> Summary:
        self._loop = asyncio.get_running_loop()
        manifest, new = self.manifest, not self.folder.exists()
        guard = RunFile(
            manifest.fingerprint, self.options.meaning(), self.shard.count, manifest.schema.id_type,
            manifest.schema.kept, self.source, manifest.total,
        )  # fmt: skip
        output = ResultStore.open(
            self.out, guard, self.shard, options=self.options.output, on_commit=self._commit, retry=self.retry,
            disk=self._disk,
        )  # fmt: skip
        self._before = output.counts
        self._again = len(output.retry_rows) if output.retry_rows is not None else 0
        self.progress = Progress(self._expected, self._before, quiet=self.quiet)
        with log_to(self.progress.write):
            return await self._supervise(output, new)

    async def _supervise(self, output: ResultStore, new: bool) -> Summary:
        assert self._loop is not None
        if self.retry is not None:
            logger.info(f"asking {self._again:,} failed rows again")
        asking = asyncio.create_task(self._ask_slurm())
        with handle_signals(self._stop, self._leave):
            if (after := self.options.output.stop_after) is not None:
                self._loop.call_later(after, self._stop, f"--stop-after {after}")
            error, ended = None, False
            try:
                ended = self._complete(output) or await self._answer(output)
            except asyncio.CancelledError:
                if self._stopped is None:
                    raise
                error = self._stopped
            except BatchvlError as raised:
                error = raised
            finally:
                try:
                    await output.close(ended and self.options.manifest.limit is None, self._total)
                except (StoppedEarly, ResumeError) as raised:
                    error = error or raised
                self.progress.close()
                asking.cancel()
            if isinstance(error, UsageError | EngineLost):
                with suppress(OSError):  # the error that led here is the one to tell
                    output.roll_back(logs=isinstance(error, EngineLost))
            if isinstance(error, UsageError):
                if new:
                    with suppress(OSError):
                        self.folder.rmdir()
                raise error
            return await self._end(error)

    def _complete(self, output: ResultStore) -> bool:
        """Whether earlier runs left nothing to do, so that no engine is needed."""
        if output.retry_rows is not None:
            return not self._again
        limit = self.options.manifest.limit
        if (
            limit is not None
            and self.shard.count == 1
            and output.counts.rows >= limit
            and output.done.count(range(limit)) == limit
        ):
            self._total = limit  # of text, whose end a limited run does not reach
            return True
        if output.complete:
            self._total = output.total
            return True
        return False

    async def _answer(self, output: ResultStore) -> bool:
        """Opens every stage, runs, and closes them in turn; True once the shard is at its end."""
        options = self.options
        async with AsyncExitStack() as stack:
            lifeline = ParentPipe()
            stack.callback(lifeline.close)
            stack.callback(asyncio.create_task(self.progress.tick()).cancel)
            stack.callback(asyncio.create_task(self._beat(output)).cancel)
            self._opening = asyncio.current_task()
            images = await stack.enter_async_context(
                ImagePipeline(
                    options.fetch,
                    options.image,
                    self._roots(),
                    log=output.directory / f"images-{output.attempt:04d}.log",
                    preload=ENGINE_TYPES[self.spec.engine].preload,
                    replicas=len(self.places),
                    on_stage_seconds=self.progress.spent,
                )
            )
            log = output.directory / f"engine-{output.attempt:04d}.log"
            engine = await stack.enter_async_context(
                ReplicaPool(self.spec, options.engine, self.places, images.tensors, lifeline, dict(os.environ), log)
            )
            special = engine.preparation.special_tokens if engine.preparation else ()
            await images.load(engine.preparation, Prompter(options.prompt, options.sampling, special).request)
            runner = Scheduler(options, images, engine, output, self.progress)
            self._opening, self._runner = None, runner
            describing = asyncio.create_task(self._describe(engine, images, output))
            try:
                await runner.answer(self._rows(output))
                if runner.stopped is None:
                    await self._answered(images, engine)
            finally:
                self._runner = None
                describing.cancel()
                await asyncio.gather(describing, return_exceptions=True)  # what it raised, the rows were told as well
                self._engine_seconds, self._gpu_wait = engine.seconds, engine.wait_share
                self._engine_deaths, self._engine_restarts = engine.deaths, engine.recycled
                self.progress.spent("engine", engine.row_seconds)
        if runner.stopped is not None:
            raise runner.stopped
        return True

    async def _answered(self, images: ImagePipeline, engine: ReplicaPool) -> None:
        """For who wants more of the stages, which are still open when all rows have been answered."""

    async def _describe(self, engine: ReplicaPool, images: ImagePipeline, output: ResultStore) -> None:
        """Once the engine is up: what really runs goes into the output's metadata."""
        info = await engine.started()
        if info.model == self.spec.model:
            info = msgspec.structs.replace(info, model=self.options.model.model)  # "shapes", not where it lies here
        self._engine = info
        self.progress.engine_up(lambda: engine.wait_share)
        id_column = self.options.manifest.id_column
        try:
            output.describe(
                {"batchvl": __version__, "engine": msgspec.json.encode(info).decode(), "id_column": id_column}
            )  # fmt: skip
        except StoppedEarly as error:
            if self._runner is not None:
                self._runner.stop(error, self.options.output.grace)
            return
        logger.info(f"{info}, lists of {info.batch_size} rows")
        for note in info.notes:
            logger.info(f"note: {note}")

    async def _beat(self, output: ResultStore) -> None:
        """Signs of life, for who watches the output folder: a model can load, or think, for minutes."""
        while True:
            total = self._total if self._total is not None else self.manifest.estimate()
            await asyncio.to_thread(output.heartbeat, total)  # in a thread: a disk that hangs must not hold up all rows
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _rows(self, output: ResultStore) -> AsyncIterator[Row]:
        """The shard's rows that are not done, read in a thread of their own, a chunk ahead."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "batchvl-manifest") as reading:
            # A retry's rows may be of a manifest that had a --limit then, and other shards for it.
            shard, stop = (self.shard, None) if output.retry_rows is None else (Shard(), output.retry_rows.stop)
            chunks = self.manifest.rows(shard, output.done, self.folder)
            ahead = loop.run_in_executor(reading, next, chunks, None)
            while (chunk := await ahead) is not None:
                ahead = loop.run_in_executor(reading, next, chunks, None)
                for row in chunk:
                    if stop is not None and row.number >= stop:
                        return
                    yield row
        limit = self.options.manifest.limit
        self._total = limit if self.manifest.total is None and limit is not None else self.manifest.total

    def _roots(self) -> list[Path]:
        return [self.manifest.directory, *map(Path, self.options.fetch.image_root)]

    def _expected(self) -> int | None:
        """The shard's rows, as well as that is known; of a retry, those that were asked before."""
        if self.retry is not None:
            return self._before.rows + self._again
        total = self._total if self._total is not None else self.manifest.estimate()
        return None if total is None else len(self.shard.rows(total))

    def _commit(self, counts: Counts) -> None:
        self.progress.commit(counts)
        bound = self.options.output.max_failures
        if bound is None or self._runner is None or not counts.failures:
            return
        failed = self._before.failures + self.progress.committed.failures
        done = self._before.rows + self.progress.committed.rows
        of = len(self.shard.rows(self._total)) if self._total is not None else done
        if failed > parse_failure_limit(bound, of) and (
            self._total is not None or "%" not in bound or done >= _RATE_ROWS
        ):
            causes = self.progress.leading_failures()
            text = f"stopped: {failed} of {done} rows failed, more than --max-failures {bound} ({causes})"
            self._runner.stop(TooManyFailures(text), self.options.output.grace)

    async def _ask_slurm(self) -> None:
        self._kill_wait = await asyncio.to_thread(kill_wait)

    def _stop(self, name: str, grace: float | None = None) -> None:
        """Ends the run in order, whatever it is doing."""
        grace = self.options.output.grace if grace is None else grace
        if name == "SIGTERM" and self._kill_wait is not None:
            grace = min(grace, max(0.0, self._kill_wait - WRITING_SECONDS))
        first = self._stopped is None
        self._stopped = self._stopped or StoppedEarly(f"stopped by {name}: run the same command again to go on")
        if self._runner is not None:
            left = self._runner.stop(self._stopped, grace)
            rows = "1 row in the engine has" if left == 1 else f"{left} rows in the engine have"
            outcome = f"no new rows; {rows} {grace:g} s to finish" if left else "no new rows, and none is in the engine"
        elif self._opening is not None:
            self._opening.cancel()
            self._opening = None
            outcome = "stopping before the first row"
        else:
            outcome = "all there is was answered; writing it"
        if first:
            logger.info(f"{name}: {outcome}")

    def _interrupt(self) -> None:
        """Stops the run from another thread, the first time in order, then without grace."""
        grace, self._grace = self._grace, 0.0
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop, "an interrupt", grace)

    def _leave(self, name: str) -> None:
        """Ends the process now. What was committed is safe, and the children go with it."""
        logger.info(f"{name} again: leaving at once; run the same command again to go on")
        os._exit(StoppedEarly.exit_code)

    async def _end(self, error: BatchvlError | None) -> Summary:
        """The summary: written, and with the results merged where this run is all there is."""
        expected = self._expected() if self._total is not None or self.retry is not None else None
        summary = summarise(
            self.progress, self._before, manifest=self.source, output=self.out, expected=expected, exit_code=0
        )
        summary.engine = self._engine
        summary.engine_deaths, summary.engine_restarts = self._engine_deaths, self._engine_restarts
        summary.engine_seconds, summary.gpu_wait = round(self._engine_seconds, 3), round(self._gpu_wait, 4)
        accepted = self.options.output.accept_failures
        if self.shard.count == 1 and error is None:
            try:
                total = self._total if self.retry is None else None  # a retry's manifest may have had a --limit
                report = await asyncio.to_thread(merge, self.out, None, total, disk=self._disk)
                if report.complete:
                    summary.results = str(report.file)
                elif self.retry is not None:
                    rows = f"{report.missing:,} rows" if report.missing else "some rows"
                    logger.info(f"{rows} were never asked: batchvl run goes on with them")
                else:  # which must not be; should it, nobody is to think that all is well
                    have = "has" if report.missing == 1 else "have"
                    error = BatchvlError(f"{pluralize(report.missing)} {have} no result: run the same command again")
            except UsageError as raised:  # nobody's mistake: until now the folder could be written
                error = StoppedEarly(f"{raised}: run the same command again to go on")
            except BatchvlError as raised:
                error = raised
        if error is not None:
            summary.exit_code, summary.message = error.exit_code, str(error)
        elif self.options.manifest.limit is None and expected is not None and summary.rows < expected:
            summary.exit_code = 1
            summary.message = f"{expected - summary.rows} rows are missing though the run came to its end: run it again"
        elif summary.failed > parse_failure_limit(accepted, summary.rows):
            summary.exit_code = 3
            summary.message = f"more rows failed than --accept-failures {accepted}"
        folder = self.folder if self.shard.count == 1 else self.out.shard(self.shard).path
        file = folder / "summary.json"
        if self.progress.committed.rows or not summary.is_told(file):  # else it tells of the run that did the work
            try:
                summary.write(file)
                await asyncio.to_thread(self.out.upload, file, str(file.relative_to(self.folder)))
            except OSError as failed:
                logger.info(f"{failed.filename or file}: cannot be written: {failed.strerror}")
        return summary
