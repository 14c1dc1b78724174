"""Engines that share a run's rows: one a GPU, or one a group of GPUs, or just one.

Rows wait in one queue and go to whichever replica is free. A replica that dies is started again while the others go
on; one that is lost for good leaves the run to the others, and with the last one the run ends. All processes are of
the model that the first one found.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import msgspec

from ..config.options import EngineOptions
from ..engines.base import EngineInfo, EngineSpec
from ..errors import BatchvlError, EngineLost, UsageError
from ..hardware.gpus import GpuAssignment
from ..images.preparation import PreparationSpec
from ..ipc.arena import Arena
from ..ipc.spawn import ParentPipe
from ..types import Request, Response
from .client import EngineClient
from .dispatch import Dispatcher
from .exits import EngineExited
from .process import LaunchContext
from .recycle import RecyclePolicy
from .replica import ModelPin, Replica

logger = logging.getLogger(__name__)


class ReplicaPool:
    """An engine in each of several places, an async context manager.

    `preparation` is known once entered, `info` once `started` has returned; `answer` may be called before. The first
    place's log is `log`, the others' lie beside it.
    """

    preparation: PreparationSpec | None

    def __init__(
        self,
        spec: EngineSpec,
        options: EngineOptions,
        places: Sequence[GpuAssignment],
        arena: Arena,
        lifeline: ParentPipe,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self._pin, self._queue = ModelPin(spec), Dispatcher()
        self._replicas: list[Replica] = []
        for number, place in enumerate(places):
            name = f"the engine on {place}" if len(places) > 1 else "the engine"
            own = log.with_stem(f"{log.stem}-{place.tag}") if number else log
            surroundings = LaunchContext(arena, lifeline, {**environment, **place.environment}, own)
            limit = RecyclePolicy(options.engine_memory, name, len(places))
            replica = Replica(name, surroundings, options, self._pin, self._queue, limit, self._over)
            self._replicas.append(replica)
        self._lost: BatchvlError | None = None
        self._killed = False
        self._ended = asyncio.Event()

    async def __aenter__(self) -> ReplicaPool:
        # The first alone, until it has found the model: what has to be downloaded is there for the others.
        self.preparation = await self._replicas[0].resolve()
        for replica in self._replicas:
            replica.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(replica.close() for replica in self._replicas))
        for replica in self._replicas:
            replica.feed.rows.give_back(EngineExited("the run ended"))
        self._queue.release(EngineExited("the run ended"))

    async def started(self) -> EngineInfo:
        """What runs, once one of them has loaded the model. Raises a UsageError or EngineLost where none can."""
        waits = [asyncio.ensure_future(event.wait()) for event in (self._pin.up, self._ended)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if self._lost is not None:
            raise self._lost
        assert self.info is not None
        return self.info

    async def answer(self, request: Request) -> Response:
        """An engine's response. Its extent may be released once this returns or raises.

        Raises EngineDied where the process died with the row in it, EngineLost where no engine will come again.
        """
        if self._lost is not None:
            raise self._lost
        answer = self._queue.add(request)
        try:
            return await answer
        except asyncio.CancelledError:
            for feed in self._queue.feeds:
                if request.row in feed.rows.held:
                    await feed.let_go(request.row)
            raise

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, rows go to one replica alone.

        It is the one that died last, whose process is the newest: a row over which that dies again, having answered
        nothing, is to blame, and the other replicas need not die over it first.
        """
        self._queue.only = self._newest()
        try:
            yield
        finally:
            self._queue.only = None

    @property
    def info(self) -> EngineInfo | None:
        """What the first of them told that was up."""
        info = self._pin.info
        return info and msgspec.structs.replace(info, replicas=len(self._replicas))

    @property
    def deaths(self) -> int:
        """How often a process died, or would not start after another had."""
        return sum(replica.deaths.count for replica in self._replicas)

    @property
    def restarts(self) -> int:
        """How often a process was replaced because its memory had grown."""
        return sum(replica.restarts for replica in self._replicas)

    @property
    def held(self) -> int:
        """How many rows are in the engines."""
        return sum(len(feed.rows.held) for feed in self._queue.feeds)

    @property
    def answers(self) -> int:
        """How many rows they have answered."""
        return self._queue.answers

    @property
    def row_seconds(self) -> float:
        """Seconds that rows were in the engines, summed over the rows."""
        return sum(feed.rows.seconds for feed in self._queue.feeds)

    @property
    def seconds(self) -> float:
        """Seconds in which an engine was up, from the first list to the latest answer: the replicas' mean."""
        return sum(feed.uptime.seconds for feed in self._queue.feeds) / len(self._replicas)

    @property
    def wait_share(self) -> float:
        """The share of these in which it was short of rows, 0 to 1."""
        waited = sum(feed.uptime.wait_seconds for feed in self._queue.feeds) / len(self._replicas)
        return min(1.0, waited / self.seconds) if self.seconds else 0.0

    @property
    def idle_since(self) -> float | None:
        """When the engines ran out of rows, on the monotonic clock; None while one has some, or none is up."""
        idle = [feed.idle_since for feed in self._queue.feeds if feed.idle_since is not None]
        return max(idle, default=None) if not self.held else None

    @property
    def prepares_text(self) -> bool:
        """Whether rows without pictures go through the image workers as well."""
        return self.preparation is not None and self.preparation.text_too

    def kill(self, reason: str) -> None:
        """Ends all processes now and for good: their rows come back as EngineDied."""
        self._killed = True
        for replica in self._replicas:
            replica.kill(reason)

    def holds(self, row: int) -> bool:
        """Whether the row is in an engine, rather than waiting to go in."""
        return any(row in feed.rows.held for feed in self._queue.feeds)

    def halved(self) -> None:
        """The runner has split the rows of a death in two: that is progress."""
        for replica in self._replicas:
            replica.deaths.progress()

    def _newest(self) -> EngineClient | None:
        living = [replica for replica in self._replicas if not replica.is_over]
        return max(living, key=lambda replica: replica.died_at).feed if living else None

    def _over(self, replica: Replica) -> None:
        """A replica will come to no other process: the others go on, unless it was the last.

        One that died over rows before there was any answer speaks for all: else the others would die over them as
        well, and rows be convicted of what is wrong with the run.
        """
        if self._lost is not None:
            return
        left = sum(not each.is_over for each in self._replicas)
        died = replica.died or EngineExited(str(replica.lost))
        if left and (self._queue.answers or not replica.died_with):
            if not self._killed:
                why = str(replica.lost).partition("\n")[0]
                logger.warning(
                    f"{replica.name} is lost, and the run goes on with {left} of {len(self._replicas)}: {why}"
                )
            replica.feed.rows.give_back(died)
            if self._queue.only is replica.feed:
                self._queue.only = self._newest()
            self._queue.changed()
            return
        refusals = [each.lost for each in self._replicas if isinstance(each.lost, UsageError)]
        if self._killed or replica.lost is None:
            self._lost = EngineLost(str(died))
        elif refusals and self._pin.info is None:  # nothing was run
            self._lost = refusals[0]
        else:
            self._lost = replica.lost
        told = died if self._killed else self._lost
        for feed in self._queue.feeds:
            feed.rows.give_back(told)
        self._queue.release(told)
        self._ended.set()
