"""A run, from its options to its summary: what is opened in which order, and what the end means."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from .._version import __version__
from ..concurrency import run_sync
from ..config.options import RunOptions
from ..config.sources import resolve_options
from ..config.units import pluralize
from ..engines.registry import ENGINE_TYPES, choose_engine, engine_spec
from ..errors import StoppedEarly
from ..hardware.gpus import assign_gpus
from ..images.pipeline import ImagePipeline
from ..ipc.spawn import ParentPipe
from ..manifest import Manifest
from ..prompts.prompter import Prompter
from ..results import Counts, RetrySelection, RunFile
from ..results.location import default_output, open_output
from ..serving.pool import ReplicaPool
from ..storage.disk import Disk
from .execution import Execution, Task
from .progress import Progress
from .scheduler import Scheduler
from .summary import EngineUse, Summary, summarise

logger = logging.getLogger(__name__)


def run(
    manifest: str | os.PathLike[str] | None = None, *, config: str | None = None, quiet: bool = False, **options: Any
) -> Summary:
    """Answer the rows of a manifest, as `batchvl run` does.

    Args:
        manifest: The manifest: a file, a directory, or a glob pattern.
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
        options = replace(options, engine=replace(options.engine, engine=engine))
        self.observer = observer or RunObserver()
        self.output = open_output(options.output.output or default_output(source), options.output.work)
        self.task = Task(source, options, self.output, quiet, retry, disk, self.observer.on_commit)
        self.spec = engine_spec(options)
        self.gpu_assignments = assign_gpus(options, ENGINE_TYPES[engine].gpus_per_replica(options))
        self.task.check()

    def run(self) -> Summary:
        """Run to the end, or to the first reason to stop. Raises a BatchvlError if nothing could be run.

        Blocks. If this thread already has a running event loop, as in a notebook, the run gets a thread of its own.
        """
        options = self.task.options
        manifest = Manifest.open(self.task.source, options.manifest, options.prompt)
        manifest.check()
        execution = _RunExecution(self, manifest)
        return run_sync(execution.run, execution.stopper.interrupt)


class _RunExecution(Execution[Summary]):
    """One execution of a job."""

    def __init__(self, job: Job, manifest: Manifest) -> None:
        super().__init__(job.task, manifest)
        self._job = job
        self._engine_use = EngineUse()

    def run_file(self) -> RunFile:
        manifest = self.manifest
        return RunFile(
            manifest.fingerprint,
            self.options.meaning(),
            self.task.shard.count,
            manifest.schema.id_type,
            manifest.schema.kept,
            self.task.source,
            manifest.total,
        )

    def make_progress(self, before: Counts) -> Progress:
        return Progress(self.expected, before, quiet=self.task.quiet)

    def summarise(self, expected: int | None, results: str | None) -> Summary:
        return summarise(
            self.progress,
            self._engine_use,
            manifest=self.task.source,
            output=str(self.task.output),
            expected=expected,
            results=results,
        )

    def describe_stop(self, left: int, grace: float) -> str:
        if not left:
            return "no new rows, and none in the engine"
        return f"no new rows; {pluralize(left)} in the engine {'has' if left == 1 else 'have'} {grace:g} s to finish"

    async def process(self) -> None:
        async with AsyncExitStack() as stack:
            with self.stopper.cancel_task():
                stages = await stack.enter_async_context(self._open_stages())
            scheduler = Scheduler(self.options, stages.images, stages.engine, self.store, self.progress)
            describing = asyncio.create_task(self._describe(stages, scheduler))
            try:
                with self.stoppable(scheduler):
                    await scheduler.run(self.rows)
                    if scheduler.stopped is None:
                        await self._job.observer.on_answered(stages)
            finally:
                describing.cancel()
                await asyncio.gather(describing, return_exceptions=True)  # the rows have raised what it raises
                engine = stages.engine
                self._engine_use = EngineUse(
                    self._engine_use.info, engine.seconds, engine.wait_share, engine.deaths, engine.recycled
                )
                self.progress.add_stage_time("engine", engine.row_seconds)
        if scheduler.stopped is not None:
            raise scheduler.stopped

    @asynccontextmanager
    async def _open_stages(self) -> AsyncIterator[Stages]:
        """Open the stages between manifest and results. The model is loaded in the background."""
        job, options, store = self._job, self.options, self.store
        async with AsyncExitStack() as stack:
            parent_pipe = ParentPipe()
            stack.callback(parent_pipe.close)
            images = await self.open_images(
                stack,
                preload=ENGINE_TYPES[job.spec.engine].preload,
                replicas=len(job.gpu_assignments),
                on_stage_seconds=self.progress.add_stage_time,
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
            yield Stages(self.manifest, images, engine, self.progress)

    async def _describe(self, stages: Stages, scheduler: Scheduler) -> None:
        """Once the engine is up, record what it is in the results' metadata."""
        engine = stages.engine
        info = await engine.started()
        if info.model == self._job.spec.model:
            info = msgspec.structs.replace(info, model=self.options.model.model)  # "shapes", not its path here
        self._engine_use = EngineUse(info)
        self.progress.engine_up(lambda: engine.wait_share)
        metadata = {
            "batchvl": __version__,
            "engine": msgspec.json.encode(info).decode(),
            "id_column": self.options.manifest.id_column,
        }
        try:
            self.store.describe(metadata)
        except StoppedEarly as error:
            scheduler.stop(error, self.options.output.grace)
            return
        logger.info(f"{info}, batches of {pluralize(info.batch_size)}")
        for note in info.notes:
            logger.info(f"note: {note}")
        self._job.observer.on_engine_up(stages)
