"""How fast a machine answers a manifest, beside how fast its engine could: `batchvl bench`."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import msgspec

from ..config.options import RunOptions
from ..config.sources import resolve_options
from ..engines.base import EngineInfo
from ..errors import BatchvlError, OptionError, RowError
from ..images.grouping import group_by_images
from ..images.pipeline import ImagePipeline
from ..images.worker_pool import RowFailed
from ..results import ResultStore
from ..serving.pool import ReplicaPool
from ..types import Request, Row
from .job import Job

logger = logging.getLogger(__name__)

ROWS = 1000
"""Of the manifest, unless --limit says otherwise."""
MOST_PREPARED = 512
_SHARE = 0.5
"""Of the arena, for rows that are prepared beforehand."""
_ENOUGH = 0.95
_LEAST_SECONDS = 30
_BUSY = 0.75
"""Share of its time from which on a stage is taken for what the others wait for."""


class Pace(msgspec.Struct, frozen=True):
    """Rows answered in so many seconds, from the first list that the engine was handed to its last answer."""

    rows: int
    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Rows a second."""
        return self.rows / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        tokens = self.tokens / max(self.seconds, 1e-9)
        return f"{self.rate:10,.1f} rows/s {tokens:10,.0f} tokens/s   {self.rows:,} rows in {self.seconds:,.1f} s"


class Comparison(msgspec.Struct, frozen=True):
    """What `bench` found. Shares are of the run's time, 0 to 1."""

    engine: EngineInfo
    run: Pace
    ceiling: Pace
    prepared: int
    """Rows that were prepared beforehand, which the ceiling's were made of."""
    gpu_wait: float
    """In which the engine was short of rows."""
    workers_busy: float
    """Of the image workers' time, all together."""
    runner_busy: float
    """Of one CPU, which is all that the runner's loop can use."""

    @property
    def ratio(self) -> float:
        """What the run reaches of what the engine could."""
        return self.run.rate / max(self.ceiling.rate, 1e-9)

    @property
    def limit(self) -> str:
        """What keeps the run from being faster, and what to do about it."""
        if self.ratio >= _ENOUGH:
            return "the engine itself: its settings (docs/lmdeploy.md), a smaller model, or more GPUs (--gpus)"
        if self.workers_busy >= max(_BUSY, self.runner_busy):
            return "the image workers: more CPUs (--image-workers), or fewer tiles of a picture (--max-tiles)"
        if self.runner_busy >= _BUSY:
            return "the runner's process, which has one CPU for fetching and for handing over"
        if self.run.seconds < _LEAST_SECONDS:
            minute = max(1, round(60 * self.ceiling.rate))
            return (
                f"too few rows to tell: in {self.run.seconds:.0f} s the engine mostly fills and empties; "
                f"--limit {minute} takes about a minute"
            )
        return (
            "no CPU of ours: pictures come too slowly (--fetch-concurrency, --fetch-per-host) or wait for memory "
            "(--arena-bytes)"
        )

    def as_json(self) -> str:
        """All of it as a JSON object."""
        whole = {"ratio": self.ratio, "limit": self.limit, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(whole), indent=2).decode()

    def __str__(self) -> str:
        return "\n".join(
            (
                str(self.engine),
                f"batchvl run         {self.run}",
                f"the engine alone    {self.ceiling}",
                f"run / engine alone  {self.ratio:.1%}",
                f"  while running: the engine waited for rows {self.gpu_wait:.1%} of the time, image workers were busy "
                f"{self.workers_busy:.0%}, the runner {self.runner_busy:.0%}",
                f"what limits the run: {self.limit}",
            )
        )


def bench(
    manifest: str | os.PathLike[str] | None = None, *, config: str | None = None, quiet: bool = False, **options: Any
) -> Comparison:
    """Answers some rows of a manifest twice with one engine: as `run` does, then with all prepared beforehand.

    Options are those of `run`; `limit` says how many rows. Nothing is kept. The rows that are prepared beforehand are
    as many as half of the arena holds, and are asked again and again, each time as if their pictures were new. Raises a
    BatchvlError where nothing could be run, or no row was answered.
    """
    if options.get("output"):
        raise OptionError("--output: bench keeps nothing")
    source, found = resolve_options(manifest, config, options)
    with tempfile.TemporaryDirectory(prefix="batchvl-bench-") as folder:
        output = replace(found.output, output=str(Path(folder) / "out"))
        rows = replace(found.manifest, limit=found.manifest.limit or ROWS)
        benched = Benched(source, replace(found, output=output, manifest=rows), quiet=quiet)
        summary = benched.run()
    if benched.found is None:
        causes = ", ".join(f"{count} {code}" for code, count in summary.failures.items())
        why = "; ".join(filter(None, (summary.message, causes))) or "the manifest has no rows"
        raise BatchvlError(f"nothing was measured: {why}")
    return benched.found


class Benched(Job):
    """A run after which its engine is asked once more, and has nothing to wait for."""

    def __init__(self, source: str, options: RunOptions, *, quiet: bool = False) -> None:
        super().__init__(source, options, quiet=quiet)
        self.found: Comparison | None = None
        self._at_start = (0.0, 0.0)

    async def _describe(self, engine: ReplicaPool, images: ImagePipeline, output: ResultStore) -> None:
        await super()._describe(engine, images, output)
        self._at_start = time.process_time(), images.busy_seconds

    async def _answered(self, images: ImagePipeline, engine: ReplicaPool) -> None:
        seconds, rows = max(engine.seconds, 1e-9), engine.answers
        runner, busy = time.process_time() - self._at_start[0], images.busy_seconds - self._at_start[1]
        run, wait = Pace(rows, self.progress.output_tokens, seconds), engine.wait_share
        with ExitStack() as stack:
            requests = await self._requests(images, engine, stack)
            if not requests:
                return
            logger.info(f"{run.rate:,.1f} rows/s; now the engine alone, with {len(requests):,} rows in turn")
            info = await engine.started()
            ceiling = await _alone(engine, requests, rows, open_rows=2 * info.rows * info.replicas)
        self.found = Comparison(
            info, run, ceiling, len(requests), wait, busy / seconds / images.worker_count, runner / seconds
        )

    async def _requests(self, images: ImagePipeline, engine: ReplicaPool, stack: ExitStack) -> list[Request]:
        """Of the manifest's first rows, prepared until the stack is closed; none of those that fail."""
        requests: list[Request] = []
        arena = images.tensors
        async for rows in group_by_images(self._first_rows(), self.options.image.look_ahead):
            if arena.free_blocks <= arena.blocks * (1 - _SHARE):
                break
            try:
                if not rows[0].images and not engine.prepares_text:
                    requests += map(images.request, rows)
                    continue
                prepared = images.prepare_group(rows)
                for _ in rows:
                    stack.callback(prepared.release)
                async with asyncio.timeout(self.options.image.prepare_timeout):
                    ready = await prepared.get()
            except (RowError, RowFailed):
                continue
            except TimeoutError:  # a large one waits for what those before it hold
                break
            requests += (request for request in ready.requests.values() if isinstance(request, Request))
        return requests

    async def _first_rows(self) -> AsyncIterator[Row]:
        rows = chain.from_iterable(self.manifest.rows(self.shard))
        for row in await asyncio.to_thread(lambda: list(islice(rows, MOST_PREPARED))):
            if row.failure is None:
                yield row


async def _alone(engine: ReplicaPool, requests: Sequence[Request], rows: int, open_rows: int) -> Pace:
    """So many rows, the requests in turn, as the engine takes them: `open_rows` are always there for it."""
    turns = iter(range(rows))
    answered = tokens = 0

    async def ask() -> None:
        nonlocal answered, tokens
        for turn in turns:
            before, at = divmod(turn, len(requests))
            request = msgspec.structs.replace(requests[at], row=turn, cache_salt=1 + before)  # 0 was the run's
            response = await engine.answer(request)
            answered += 1
            tokens += response.output_tokens or 0

    begin = time.monotonic()
    async with asyncio.TaskGroup() as asking:
        for _ in range(min(open_rows, rows)):
            asking.create_task(ask())
    return Pace(answered, tokens, time.monotonic() - begin)
