"""One replica: an engine that is kept alive by replacing each process that exits.

When a process dies, its rows fail with `EngineExited`, for the runner to retry after all others, in halves. A death
before the run's first answer suggests a wrong configuration, and the second one is final; later, five deaths without
progress in between are. A restart that the engine refuses counts as a death, and the next attempt waits for a while. A
process whose memory has grown too large is recycled: it receives no more rows, and is replaced once it has answered
those in flight.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from enum import Enum

import msgspec

from ..config.options import EngineOptions
from ..config.units import pluralize
from ..engines.base import EngineInfo, EngineSpec
from ..errors import BatchvlError, EngineLost, EngineUnavailable, UsageError
from ..images.preparation import PreparationSpec
from ..types import Response
from .client import EngineClient
from .exits import EngineExited, RestartPolicy, RestartRefused, Unkillable
from .process import EngineProcess, LaunchContext
from .recycle import RecyclePolicy, format_bytes

logger = logging.getLogger(__name__)

MEMORY_SECONDS = 3.0
"""Seconds between two checks of the memory of the engine's processes."""


class Status(Enum):
    """The state of a replica."""

    RESOLVING = "resolving"
    """Its first process looks for the model, or waits to load it."""
    STARTING = "starting"
    """A process loads the model."""
    UP = "up"
    """A process answers rows."""
    DRAINING = "draining"
    """The process answers its last rows, since it is to be recycled."""
    RESTARTING = "restarting"
    """The process has exited, or is about to, and another one is to follow."""
    FAILED = "failed"
    """No other process will follow; `error` says why."""
    CLOSED = "closed"
    """Killed for good."""


class ModelPin:
    """The model that all processes of a run must serve: the one that the first process found."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        """What processes are started with."""
        self.info: EngineInfo | None = None
        """What the first process that was up reported."""
        self.settled = asyncio.Event()
        """Set once a process has been up, or none ever will be."""

    def check(self, info: EngineInfo) -> None:
        """Pin the model of the first process that is up. Raises EngineLost if a later one serves another model."""
        if self.info is None:
            self.info = info
            self.spec = msgspec.structs.replace(self.spec, revision=info.revision or self.spec.revision)
            return
        for field in ("revision", "template_sha256"):
            pinned, current = getattr(self.info, field), getattr(info, field)
            if current != pinned:
                raise EngineLost(
                    f"the model has changed since the run began: the restarted engine has {field} {current}, not "
                    f"{pinned}; its rows would be answered by another model"
                )


class Replica:
    """An engine process and its successors.

    Call `resolve` on the first replica of a run, `run` on all, and `close` once `run` has returned or is cancelled.

    Args:
        client: Sends rows to the processes.
        context: What the processes are started with.
        options: Time limits.
        pin: The run's model, shared by all replicas.
        recycling: Decides when a process uses too much memory.
        any_answers: Returns whether any replica of the run has answered a row.
        name: The engine's name in log messages: "the engine", or which one it is.
    """

    def __init__(
        self,
        client: EngineClient,
        context: LaunchContext,
        options: EngineOptions,
        pin: ModelPin,
        recycling: RecyclePolicy,
        any_answers: Callable[[], bool],
        name: str = "the engine",
    ) -> None:
        self.client, self.name = client, name
        self._context, self._options, self._pin = context, options, pin
        self._recycling, self._any_answers = recycling, any_answers
        self.restarts = RestartPolicy(name, context.log)
        self.status = Status.RESOLVING
        self.process: EngineProcess | None = None
        """The current process, or the latest."""
        self.recycled = 0
        """Number of processes replaced because of their memory."""
        self.last_exit: EngineExited | None = None
        self.error: BatchvlError | None = None
        """Why the status is FAILED."""
        self._down_since: float | None = None
        self._kill_reason = ""
        self._killed = asyncio.Event()

    @property
    def is_over(self) -> bool:
        """Whether no other process will follow."""
        return self.status in (Status.FAILED, Status.CLOSED)

    async def resolve(self) -> PreparationSpec | None:
        """Start the first process, and a second one if that dies. Return how the model's inputs are prepared.

        Raises:
            UsageError: The engine refused to start.
            EngineLost: Both processes died.
        """
        while True:
            process = await self._launch()
            try:
                return await process.resolved
            except EngineExited as exited:
                await asyncio.shield(process.exited)
                if self._killed.is_set():
                    raise EngineLost(str(exited)) from None
                self.restarts.record(exited, any_answers=self._any_answers(), was_up=False)
            except BaseException:
                process.kill("it could not start")
                await asyncio.shield(process.exited)
                raise

    async def run(self) -> None:
        """Keep a process up until the replica is killed or gives up. Rows of the last process stay in flight."""
        try:
            process = self.process or await self._launch()
            while True:
                await self._run_process(process)
                if self._killed.is_set():
                    break
                process = await self._launch()
            self.status = Status.CLOSED
        except (BatchvlError, OSError) as error:
            self.error, self.status = self._as_final(error), Status.FAILED
            if self.process is not None:
                self.process.kill("it was not needed any more")

    def kill(self, reason: str) -> None:
        """Kill the process now; no other follows."""
        self._kill_reason = reason
        self._killed.set()
        if self.process is not None:
            self.process.kill(reason)

    async def close(self) -> None:
        """End the process, and return when it has exited."""
        if self.process is not None:
            await self.process.close()

    async def _launch(self) -> EngineProcess:
        process = EngineProcess(self._on_answers, self.client.on_alive)
        await process.open(self._pin.spec, self._context)
        self.process = process
        if self._killed.is_set():
            process.kill(self._kill_reason)
        return process

    async def _run_process(self, process: EngineProcess) -> None:
        """Take a process from its start to its exit. Return once it may be replaced, or the replica was killed.

        Raises a BatchvlError if the exit was the last.
        """
        answers_before = self.client.answers
        self.status = Status.STARTING
        refusal = await self._await_start(process)
        was_up = self.status is Status.UP
        exited = await (self._watch(process) if was_up else asyncio.shield(process.exited))
        recycled = self.status is Status.RESTARTING
        self.status = Status.RESTARTING
        exited.time = time.monotonic()
        exited.answered, exited.in_flight = self.client.answers - answers_before, len(self.client.in_flight)
        self.last_exit, self._down_since = exited, self._down_since or exited.time
        self.client.close()
        if self._killed.is_set():
            return
        if isinstance(exited, Unkillable):
            raise EngineLost(str(exited))
        if recycled:
            self.recycled += 1
            return
        await self._handle_death(refusal or exited, was_up)

    async def _await_start(self, process: EngineProcess) -> RestartRefused | None:
        """Wait until the process is UP or has exited. Return a refusal after which the next attempt may succeed.

        Raises another refusal, and EngineLost if the process serves another model.
        """
        try:
            async with asyncio.timeout(self._options.start_timeout):
                info = await asyncio.shield(process.started)
            self._pin.check(info)
            self.restarts.on_start()
            self._recycling.on_start(await process.memory(), process.start_seconds)
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
            logger.info(f"{self.name} is up again after {time.monotonic() - self._down_since:.1f} s")
            self._down_since = None
        self.status = Status.UP
        self.client.open(process, info)
        self._pin.settled.set()
        return None

    async def _watch(self, process: EngineProcess) -> EngineExited:
        """Enforce the limits of a process that is up, until it has exited."""
        loop = asyncio.get_running_loop()
        timeouts = loop.create_task(self.client.enforce_timeouts(process, self._context.log))
        memory = loop.create_task(self._recycle_when_large(process))
        try:
            return await asyncio.shield(process.exited)
        finally:
            timeouts.cancel()
            memory.cancel()

    async def _recycle_when_large(self, process: EngineProcess) -> None:
        """Drain and end the process once it exceeds the memory limit."""
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            used = await process.memory()
            if not process.gone and self._recycling.exceeded(used):
                break
        rows = len(self.client.in_flight)
        when = f" once it has answered the {pluralize(rows)} in flight" if rows else ""
        logger.info(
            f"{self.name} uses {format_bytes(used)} of memory, more than {format_bytes(self._recycling.limit)} "
            f"(--engine-memory): restarting it{when}"
        )
        self.status = Status.DRAINING
        await self.client.drain()
        self.status = Status.RESTARTING
        await process.close()

    async def _handle_death(self, exited: EngineExited, was_up: bool) -> None:
        """Fail the rows in flight, and wait until another process may start. Raises EngineLost if none may."""
        exited.in_flight, exited.time = len(self.client.in_flight), time.monotonic()
        self.client.canary = not self.client.answers
        self.restarts.record(exited, any_answers=self._any_answers(), was_up=was_up)
        self.client.in_flight.fail(exited)
        with suppress(TimeoutError):
            async with asyncio.timeout(self.restarts.pause):
                await self._killed.wait()

    def _as_final(self, error: BatchvlError | OSError) -> BatchvlError:
        """Return the error for the run when no other process can be started."""
        if isinstance(error, OSError):
            return EngineLost(f"cannot start an engine process: {error}")
        if self._pin.info is not None and isinstance(error, UsageError):  # not a usage error: rows were answered
            verb = "restart" if self._down_since is not None else "start"
            return EngineLost(f"cannot {verb} the engine: {error}")
        return error

    def _on_answers(self, responses: list[Response]) -> None:
        self.restarts.note_progress()
        self.client.on_answers(responses)
