"""An engine's process, seen from the runner: started, told, heard, and ended for certain."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .. import errors
from ..engines.base import EngineInfo, EngineSpec
from ..images.preparation import PreparationSpec
from ..ipc.arena import Arena
from ..ipc.channel import AsyncConnection
from ..ipc.process_tree import end_group, memory_of, state_of
from ..ipc.spawn import ParentPipe, spawn
from ..storage.disk import as_stopped_early
from ..types import Request, Response
from .exits import EngineExited, ExitDiagnoser, Unkillable
from .messages import Abort, Alive, Answers, FromEngine, Infer, ModelResolved, Note, Open, Started, StartRefused

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 10.0
"""How long a process may live on whose socket is closed, by whichever side, before it is killed."""
UNKILLABLE_SECONDS = 60.0
"""How long a killed process may live on, stuck in the kernel, before nobody waits for it any more."""
_LOOK_SECONDS = 0.005
"""How often an end that must come is looked for."""


class LaunchContext(NamedTuple):
    """What an engine's processes find around them: prepared tensors, the runner, an environment, and a log."""

    arena: Arena
    lifeline: ParentPipe
    environment: Mapping[str, str]
    log: Path


class EngineProcess:
    """One engine process and what it starts, which ends with it.

    `resolved` and `started` are futures; `died` is set once it is reaped, or was given up as `Unkillable`.

    `answered` is called with each list of responses, `alive` with every sign of life.
    """

    def __init__(self, answered: Callable[[list[Response]], None], alive: Callable[[Alive], None]) -> None:
        loop = asyncio.get_running_loop()
        self.resolved: asyncio.Future[PreparationSpec | None] = loop.create_future()
        self.started: asyncio.Future[EngineInfo] = loop.create_future()
        self.died: asyncio.Future[EngineExited] = loop.create_future()
        self._answered, self._alive = answered, alive
        self._ended_for: str | None = None
        self._how = ""
        self._killed: float | None = None
        self._reaping: asyncio.Task[None] | None = None
        self._socket_ended = asyncio.Event()
        self._resolved_at = time.monotonic()
        self.start_seconds = 0.0
        """What loading the model took, once it is up; its download before that is no cost of the next process."""
        self.gone = False
        """Whether nothing can be told to it any more."""

    async def open(self, spec: EngineSpec, surroundings: LaunchContext) -> None:
        """Starts the process; its output is appended to the log. Raises StoppedEarly where there can be none."""
        arena, lifeline, environment, log = surroundings
        try:
            file = open(log, "ab")  # noqa: ASYNC230, SIM115 - once a process
        except OSError as error:
            raise as_stopped_early(log, error) from error
        ours, theirs = socket.socketpair()
        with theirs, file:
            self._witness = ExitDiagnoser(spec.engine, log, file.tell())
            fds = [theirs.fileno(), lifeline.fd, arena.fd]
            arguments = [str(theirs.fileno()), str(lifeline.fd), str(os.getpid())]
            try:
                self._process = spawn("batchvl.serving.engine_main", arguments, fds, environment, file)
            except OSError:
                ours.close()
                raise
        try:
            self._channel: AsyncConnection[FromEngine] = await AsyncConnection.open(
                ours, FromEngine, self._received, self._lost
            )
        except BaseException:
            self._signal(signal.SIGKILL)
            self._process.wait()
            raise
        self._channel.send(Open(spec, arena.fd, arena.size))

    @property
    def pid(self) -> int:
        return self._process.pid

    def infer(self, requests: list[Request]) -> None:
        self._channel.send(Infer(requests))

    def abort(self, row: int) -> None:
        self._channel.send(Abort(row))

    def dump_stacks(self) -> None:
        """Has the process write where each of its threads stands to its log."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR2)  # Popen's own way would reap it, and its group be out of reach

    async def memory(self) -> int:
        """Bytes that the process and its descendants have for themselves."""
        return await asyncio.to_thread(memory_of, self.pid)

    def kill(self, reason: str, how: str = "") -> None:
        """Ends the process and all that it started now; `died` follows, with this reason, and `how` in a few words."""
        if self._killed is None:
            self._killed, self._ended_for, self._how = time.monotonic(), reason, how
        self._signal(signal.SIGKILL)
        self._await_end()

    async def close(self) -> None:
        """Has the process leave, sees to it that it does, and returns when it is gone."""
        self._channel.close()
        if not self.started.done():
            self.kill("it was not needed any more")  # while it loads a model it hears nothing
        self._await_end()  # the socket may stay open for what the process does not read
        await asyncio.shield(self.died)

    def _received(self, message: FromEngine) -> None:
        match message:
            case Answers(responses):
                self._answered(responses)
            case Alive():
                self._alive(message)
            case Note(text, level):
                logger.log(level, "%s", text)
            case ModelResolved(preparation):
                self._resolved_at = time.monotonic()
                if not self.resolved.done():
                    self.resolved.set_result(preparation)
            case Started(info):
                self.start_seconds = time.monotonic() - self._resolved_at
                if not self.started.done():
                    self.started.set_result(info)
            case StartRefused(name, text):
                error = getattr(errors, name)(text)
                for future in (self.resolved, self.started):
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # told once, to whoever awaits it
                self._channel.close()

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # reaped, its number and its group's may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _lost(self) -> None:
        """The socket ended, and with it, or soon, the process."""
        self._socket_ended.set()
        self._await_end()

    def _await_end(self) -> None:
        self.gone = True
        if self._reaping is None:
            self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        """Waits for the end, in no thread that a process could hold for ever, and tells of it."""
        leave_by = time.monotonic() + LEAVE_SECONDS
        while (alive := await self._survivor()) is not None:
            now = time.monotonic()
            if alive == self.pid and self._killed is None and now > leave_by:
                self.kill(f"it lived on for {LEAVE_SECONDS:g} s when its socket was closed")
            if now > (self._killed or leave_by) + UNKILLABLE_SECONDS:
                died: EngineExited = Unkillable(alive, state_of(alive), UNKILLABLE_SECONDS)
                logger.error("%s", died)
                break
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            died = self._witness.died(self._process.wait(), self._ended_for, self._how)
            with suppress(TimeoutError):  # somebody outside its group may hold its socket
                async with asyncio.timeout(1):
                    await self._socket_ended.wait()  # behind its last answers
        self._channel.close()
        for future in (self.resolved, self.started):
            if not future.done():
                future.set_exception(died)
                future.exception()
        if not self.died.done():
            self.died.set_result(died)

    async def _survivor(self) -> int | None:
        """The process, or else one of its group that lives; None once all have ended, the process not reaped yet."""
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # noqa: ASYNC222 - no waiting
        except ChildProcessError:  # reaped by somebody else: the guardian sees to the group
            return None
        return self.pid if ended is None else await asyncio.to_thread(end_group, self.pid)
