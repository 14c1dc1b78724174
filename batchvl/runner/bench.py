"""`batchvl bench`: compare the throughput of a run with that of its engine alone, and find what limits it."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ..config.options import RunOptions
from ..config.sources import resolve_options
from ..engines.base import EngineInfo
from ..errors import BatchvlError, OptionError, RowError
from ..images.grouping import group_by_images
from ..images.worker_pool import RowFailed
from ..manifest import Manifest
from ..types import Request, Response, Row
from .job import Job, RunObserver, Stages

logger = logging.getLogger(__name__)

ROWS = 1000
"""Rows of the manifest to run, unless --limit is given."""
MAX_PREPARED = 512
"""Rows to prepare beforehand."""
_ARENA_SHARE = 0.5
"""Share of the arena for rows that are prepared beforehand."""
_ENGINE_BOUND = 0.95
"""Ratio of run to ceiling from which on the engine itself is the limit."""
_MIN_SECONDS = 30
"""Seconds below which a run mostly fills and empties the engine."""
_BUSY = 0.75
"""Share of its time from which on a stage is what the others wait for."""


class Pace(msgspec.Struct, frozen=True):
    """Rows answered in a time: from the first batch that the engine received to its last answer."""

    rows: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        tokens = self.tokens / max(self.seconds, 1e-9)
        return f"{self.rate:10,.1f} rows/s {tokens:10,.0f} tokens/s   {self.rows:,} rows in {self.seconds:,.1f} s"


class Comparison(msgspec.Struct, frozen=True):
    """The result of `bench`. Shares are of the run's time, 0 to 1."""

    engine: EngineInfo
    run: Pace
    ceiling: Pace
    """The engine alone."""
    prepared: int
    """Number of rows that were prepared beforehand, which the engine alone answered over and over."""
    gpu_wait: float
    """Share in which the engine was short of rows."""
    workers_busy: float
    """Share in which the image workers were busy, all taken together."""
    runner_busy: float
    """Share of one CPU, which is all that the runner can use."""

    @property
    def ratio(self) -> float:
        """Throughput of the run, relative to that of the engine alone."""
        return self.run.rate / max(self.ceiling.rate, 1e-9)

    @property
    def limit(self) -> str:
        """What keeps the run from being faster, and what to do about it."""
        if self.ratio >= _ENGINE_BOUND:
            return "the engine itself: tune its settings (docs/lmdeploy.md), use a smaller model or more GPUs (--gpus)"
        if self.workers_busy >= max(_BUSY, self.runner_busy):
            return "the image workers: use more CPUs (--image-workers) or fewer tiles per image (--max-tiles)"
        if self.runner_busy >= _BUSY:
            return "the runner's process, which has one CPU for fetching and dispatching"
        if self.run.seconds < _MIN_SECONDS:
            minute = max(1, round(60 * self.ceiling.rate))
            return (
                f"unknown, too few rows: in {self.run.seconds:.0f} s the engine mostly fills and empties; "
                f"--limit {minute} takes about a minute"
            )
        return (
            "no CPU of this machine: images arrive too slowly (--fetch-concurrency, --fetch-per-host) or wait for "
            "memory (--arena-bytes)"
        )

    def as_json(self) -> str:
        """Return all of it as a JSON object."""
        fields = {"ratio": self.ratio, "limit": self.limit, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(fields), indent=2).decode()

    def __str__(self) -> str:
        return "\n".join(
            (
                str(self.engine),
                f"batchvl run         {self.run}",
                f"the engine alone    {self.ceiling}",
                f"run / engine alone  {self.ratio:.1%}",
                f"  during the run: the engine waited for rows {self.gpu_wait:.1%} of the time, the image workers were "
                f"busy {self.workers_busy:.0%}, the runner {self.runner_busy:.0%}",
                f"what limits the run: {self.limit}",
            )
        )


def bench(
    manifest: str | os.PathLike[str] | None = None, *, config: str | None = None, quiet: bool = False, **options: Any
) -> Comparison:
    """Answer the first rows of a manifest as `run` does, then with the engine alone. Results are discarded.

    For the engine alone, as many rows as half of the arena holds are prepared beforehand. They are answered over and
    over, each time as if their images were new.

    Args:
        manifest: The manifest.
        config: The TOML job file.
        quiet: Whether to show no progress.
        **options: The options of `run`; `limit` is the number of rows.

    Raises:
        BatchvlError: Nothing could be run, or no row was answered.
    """
    if options.get("output"):
        raise OptionError("--output: not allowed, since bench discards its results")
    source, resolved = resolve_options(manifest, config, options)
    with tempfile.TemporaryDirectory(prefix="batchvl-bench-") as directory:
        output = replace(resolved.output, output=str(Path(directory) / "out"))
        rows = replace(resolved.manifest, limit=resolved.manifest.limit or ROWS)
        resolved = replace(resolved, output=output, manifest=rows)
        measurement = _Measurement(resolved)
        summary = Job(source, resolved, quiet=quiet, observer=measurement).run()
    if measurement.comparison is None:
        causes = ", ".join(f"{count} {code}" for code, count in summary.failures.items())
        reason = "; ".join(filter(None, (summary.message, causes))) or "the manifest has no rows"
        raise BatchvlError(f"nothing was measured: {reason}")
    return measurement.comparison


class _Measurement(RunObserver):
    """Measures a run, and then its engine alone."""

    def __init__(self, options: RunOptions) -> None:
        self.comparison: Comparison | None = None
        self._options = options
        self._cpu_seconds = self._busy_seconds = 0.0

    def on_engine_up(self, stages: Stages) -> None:
        self._cpu_seconds, self._busy_seconds = time.process_time(), stages.images.busy_seconds

    async def on_answered(self, stages: Stages) -> None:
        engine, images = stages.engine, stages.images
        seconds, rows = max(engine.seconds, 1e-9), engine.answers
        runner_busy = (time.process_time() - self._cpu_seconds) / seconds
        workers_busy = (images.busy_seconds - self._busy_seconds) / seconds / images.worker_count
        run, gpu_wait = Pace(rows, stages.progress.output_tokens, seconds), engine.wait_share
        with ExitStack() as stack:
            requests = await self._prepare(stages, stack)
            if not requests:
                return
            logger.info(f"{run.rate:,.1f} rows/s; now the engine alone, with {len(requests):,} prepared rows")
            info = await engine.started()
            ceiling = await measure_engine(engine, requests, rows, concurrency=2 * info.rows * info.replicas)
        self.comparison = Comparison(info, run, ceiling, len(requests), gpu_wait, workers_busy, runner_busy)

    async def _prepare(self, stages: Stages, stack: ExitStack) -> list[Request]:
        """Prepare the first rows of the manifest, without those that fail. The stack releases their tensors."""
        requests: list[Request] = []
        images = stages.images
        arena = images.tensors
        groups = group_by_images(_first_rows(stages.manifest, self._options), self._options.image.look_ahead)
        async with aclosing(images.fetch_ahead(groups)) as fetched_groups:
            async for group in fetched_groups:
                rows = group.rows
                for row in rows:
                    images.inline_budget.release(row.inline_bytes)
                if arena.free_blocks <= arena.blocks * (1 - _ARENA_SHARE):
                    break
                try:
                    if not rows[0].images and not stages.engine.prepares_text:
                        requests += map(images.request, rows)
                        continue
                    prepared = images.prepare_group(group)
                    for _ in rows:
                        stack.callback(prepared.release)
                    async with asyncio.timeout(self._options.image.prepare_timeout):
                        ready = await prepared.get()
                except (RowError, RowFailed):
                    continue
                except TimeoutError:  # a large row waits for memory that earlier ones hold
                    break
                requests += (request for request in ready.requests.values() if isinstance(request, Request))
        return requests


async def _first_rows(manifest: Manifest, options: RunOptions) -> AsyncIterator[Row]:
    rows = chain.from_iterable(manifest.rows(options.manifest.shard))
    for row in await asyncio.to_thread(lambda: list(islice(rows, MAX_PREPARED))):
        if row.failure is None:
            yield row


class _Answering(Protocol):
    async def answer(self, request: Request) -> Response: ...


async def measure_engine(engine: _Answering, requests: Sequence[Request], rows: int, concurrency: int) -> Pace:
    """Measure an engine that never waits for rows.

    Args:
        engine: The engine.
        requests: Prepared requests, used in turn. Each time they get another cache salt, so that the engine finds
            none of their images in its cache.
        rows: Number of rows to answer.
        concurrency: Number of requests that are open at any time.
    """
    numbers = iter(range(rows))
    answered = tokens = 0

    async def ask() -> None:
        nonlocal answered, tokens
        for number in numbers:
            turn, index = divmod(number, len(requests))
            request = msgspec.structs.replace(requests[index], row=number, cache_salt=1 + turn)  # 0 was the run's
            response = await engine.answer(request)
            answered += 1
            tokens += response.output_tokens or 0

    begin = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(min(concurrency, rows)):
            tasks.create_task(ask())
    return Pace(answered, tokens, time.monotonic() - begin)
