"""One engine that is kept alive: a process that dies is replaced.

Deaths by the contract: the rows that the dead process held come back as `EngineExited`, for the runner to try again
after all others, in halves. A death before the first answer ever is taken for a configuration error and is final the
second time; later, five deaths without progress in between are, and a successor that finds no room to start counts as
one, with a pause. A process whose memory grows too large is no death: it is handed no more rows, and is replaced once
it has answered those that it holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from ..config.options import EngineOptions
from ..config.units import pluralize
from ..engines.base import EngineInfo, EngineSpec
from ..errors import BatchvlError, EngineLost, EngineUnavailable, UsageError
from ..images.preparation import PreparationSpec
from ..types import Response
from .client import EngineClient
from .dispatch import Dispatcher
from .exits import EngineExited, RestartPolicy, RestartRefused, Unkillable
from .process import EngineProcess, LaunchContext
from .recycle import RecyclePolicy, format_bytes

logger = logging.getLogger(__name__)

MEMORY_SECONDS = 3.0
"""How often the memory of the engine's processes is looked at."""


class Replica:
    """An engine process and its successors, which share rows with other replicas by way of a queue.

    name: "the engine", or which one it is. `over` is called once no other process will come.
    """

    def __init__(
        self,
        name: str,
        surroundings: LaunchContext,
        options: EngineOptions,
        pin: ModelPin,
        queue: Dispatcher,
        limit: RecyclePolicy,
        over: Callable[[Replica], None],
    ) -> None:
        self.name, self._surroundings, self._options, self._pin = name, surroundings, options, pin
        self._queue, self._limit, self._over = queue, limit, over
        self.feed = EngineClient(name, options, queue.changed)
        queue.feeds.append(self.feed)
        self.deaths = RestartPolicy(name, surroundings.log)
        self.restarts = 0
        """How often a process was replaced because its memory had grown."""
        self.is_over = False
        self.lost: BatchvlError | None = None
        """Why it is over, unless it was killed."""
        self.died: EngineExited | None = None
        """How the last process ended that has."""
        self.died_with = 0
        """Rows that were in the last one that died."""
        self.died_at = 0.0
        """When the last one died, on the monotonic clock."""
        self._tasks: list[asyncio.Task[None]] = []
        self._process: EngineProcess | None = None
        self._answers_before = 0
        self._killed_for = ""
        self._killed = asyncio.Event()
        self._closing: asyncio.Task[None] | None = None
        self._up = False
        self._down_since: float | None = None

    async def resolve(self) -> PreparationSpec | None:
        """Starts the first process, and a second where that dies; how its inputs are prepared.

        Raises a UsageError where it refuses, and EngineLost.
        """
        while True:
            process = await self._launch()
            try:
                return await process.resolved
            except EngineExited as died:
                await asyncio.shield(process.died)
                if self._killed.is_set():
                    raise EngineLost(str(died)) from None
                self.deaths.add(died, self._queue.answers, None)
            except BaseException:
                process.kill("it could not start")
                await asyncio.shield(process.died)
                raise

    def start(self) -> None:
        """Keeps it alive from now on, and starts the first process where `resolve` has not."""
        lives = self._live(), self.feed.watch(self._surroundings.log), self._watch_memory()
        self._tasks = [asyncio.get_running_loop().create_task(life) for life in lives]

    def kill(self, reason: str) -> None:
        """Ends the process now and for good: its rows come back as EngineDied."""
        self._killed_for = reason
        self._killed.set()
        if self._process is not None:
            self._process.kill(reason)

    async def close(self) -> None:
        """Has the process leave, and returns when it is gone."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._process is not None:
            await self._process.close()
        if self._closing is not None:
            await self._closing

    async def _launch(self) -> EngineProcess:
        process = EngineProcess(self._answered, self.feed.alive)
        await process.open(self._pin.spec, self._surroundings)
        self._process = process
        if self._killed.is_set():
            process.kill(self._killed_for)
        return process

    async def _live(self) -> None:
        """Sees process after process through to its end, until one ends it all."""
        try:
            process = self._process or await self._launch()
            while True:
                refused = await self._start(process)
                died = await asyncio.shield(process.died)
                held = len(self.feed.rows.held) if self._up else None
                self._up, self._down_since = False, self._down_since or time.monotonic()
                self.feed.close()
                self.died = died
                died.answered, self._answers_before = self.feed.answers - self._answers_before, self.feed.answers
                if not self._killed.is_set():
                    await self._succeed(refused or died, held)
                if self._killed.is_set():  # perhaps while the next one waited
                    break
                process = await self._launch()
        except (BatchvlError, OSError) as error:
            again = " again" if self._down_since is not None else ""
            if isinstance(error, OSError):
                self.lost = EngineLost(f"no engine process can be started: {error}")
            elif self._pin.info is not None and isinstance(error, UsageError):  # refused, but rows were answered
                self.lost = EngineLost(f"the engine could not be started{again}: {error}")
            else:
                self.lost = error
            if self._process is not None:
                self._process.kill("it is not needed any more")
        self.is_over = True
        self._over(self)

    async def _start(self, process: EngineProcess) -> RestartRefused | None:
        """Waits until the process is up, or has ended. Returns a refusal that may pass, raises a UsageError else."""
        try:
            async with asyncio.timeout(self._options.start_timeout):
                info = await asyncio.shield(process.started)
            self._pin.check(info)
            self.deaths.started()
            self._limit.started(await process.memory(), process.start_seconds)
        except TimeoutError:
            process.kill(f"it was not up after {self._options.start_timeout:g} s (--start-timeout)")
            return None
        except EngineExited:
            return None
        except EngineUnavailable as error:
            if self._pin.info is None:
                raise
            return RestartRefused(error)
        if self._down_since is not None:
            logger.info(f"{self.name} is up again, after {time.monotonic() - self._down_since:.1f} s")
            self._down_since = None
        self._up = True
        self.feed.open(process, info)
        self._pin.up.set()
        return None

    async def _succeed(self, died: EngineExited, held: int | None) -> None:
        """Returns once another process may take the dead one's place. Raises EngineLost where that was the last."""
        if isinstance(died, Unkillable):
            raise EngineLost(str(died))
        if self._closing is not None:
            await self._closing
            self._closing = None
            self.restarts += 1
            return
        self.died_at, self.died_with = time.monotonic(), held or 0
        self.feed.singly = True
        self.deaths.add(died, self._queue.answers, held)
        self.feed.rows.give_back(died)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.deaths.pause):
                await self._killed.wait()

    def _answered(self, responses: list[Response]) -> None:
        self.deaths.progress()
        self.feed.answered(responses)

    async def _watch_memory(self) -> None:
        """Has a process replaced that has grown beyond the limit."""
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            process = self._process
            if process is None:
                continue
            found = await process.memory()
            if self.feed.is_open and not process.gone and self._limit.exceeded(found):
                held = len(self.feed.rows.held)
                then = f", once it has answered the {pluralize(held)} that it has" if held else ""
                logger.info(
                    f"{self.name} holds {format_bytes(found)} of memory, more than {format_bytes(self._limit.bytes)} "
                    f"(--engine-memory): it is started afresh{then}"
                )
                self.feed.drain(self._close)

    def _close(self) -> None:
        if self._closing is None and self._process is not None:
            self._closing = asyncio.get_running_loop().create_task(self._process.close())


class ModelPin:
    """`spec` is what processes are told to run; `info` what the first one that was up told of itself."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.up = asyncio.Event()
        """Set once a process of it has been up."""

    def check(self, info: EngineInfo) -> None:
        """A process is up. Raises EngineLost for one that is of another model."""
        if self.info is None:
            self.info = info
            self.spec = msgspec.structs.replace(self.spec, revision=info.revision or self.spec.revision)
            return
        for what in ("revision", "template_sha256"):
            then, now = getattr(self.info, what), getattr(info, what)
            if now != then:
                raise EngineLost(
                    f"the model has changed since the run began: the engine was started again with {what} {now}, not "
                    f"{then}: rows would be answered by another model"
                )
