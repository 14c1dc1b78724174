"""An engine's process as the runner sees it: start it, exchange messages with it, and make sure that it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ..engines.base import EngineInfo, EngineSpec
from ..images.preparation import PreparationSpec
from ..ipc.arena import Arena
from ..ipc.channel import AsyncConnection
from ..ipc.notes import Note
from ..ipc.process_tree import end_group, memory_of, state_of
from ..ipc.spawn import ParentPipe, spawn_with_socket
from ..storage.disk import as_stopped_early
from ..types import Request, Response
from .exits import EngineExited, ExitDiagnoser, Unkillable
from .messages import Abort, Alive, Answers, FromEngine, Infer, ModelResolved, Open, Started, StartRefused

logger = logging.getLogger(__name__)

LEAVE_SECONDS = 10.0
"""Seconds that a process gets to exit after its socket was closed, by either side, before it is killed."""
UNKILLABLE_SECONDS = 60.0
"""Seconds that a killed process gets to exit before it counts as stuck in the kernel."""
_POLL_SECONDS = 0.005
"""Seconds between two checks for an exit that is due."""


class LaunchContext(NamedTuple):
    """What every process of a replica is started with."""

    arena: Arena
    """Prepared tensors."""
    parent_pipe: ParentPipe
    environment: Mapping[str, str]
    log: Path
    """File to which the output of the processes is appended."""


class EngineProcess:
    """One engine process, with the processes that it starts: they end with it.

    Three futures tell how far it is: `resolved`, `started`, and `exited`, which is set once the process is reaped or
    was given up as `Unkillable`.

    Args:
        on_answers: Called with responses as they arrive.
        on_alive: Called with each heartbeat.
    """

    def __init__(self, on_answers: Callable[[list[Response]], None], on_alive: Callable[[Alive], None]) -> None:
        loop = asyncio.get_running_loop()
        self.resolved: asyncio.Future[PreparationSpec | None] = loop.create_future()
        self.started: asyncio.Future[EngineInfo] = loop.create_future()
        self.exited: asyncio.Future[EngineExited] = loop.create_future()
        self._on_answers, self._on_alive = on_answers, on_alive
        self._kill_reason: str | None = None
        self._kill_summary = ""
        self._killed_at: float | None = None
        self._reaping: asyncio.Task[None] | None = None
        self._socket_closed = asyncio.Event()
        self._resolved_at = time.monotonic()
        self.start_seconds = 0.0
        """Seconds that it took to load the model, once it is up. Excludes the download, which happens only once."""
        self.gone = False
        """Whether the process takes no messages any more."""

    async def open(self, spec: EngineSpec, context: LaunchContext) -> None:
        """Start the process. Raises StoppedEarly if its log cannot be written, and OSError if it cannot be started."""
        arena, parent_pipe, environment, log = context
        try:
            file = open(log, "ab")  # noqa: ASYNC230, SIM115 - once a process
        except OSError as error:
            raise as_stopped_early(log, error) from error
        with file:
            self._diagnoser = ExitDiagnoser(spec.engine, log, file.tell())
            self._process, sock = spawn_with_socket(
                "batchvl.serving.engine_main", parent_pipe, [arena.fd], environment, file
            )
        try:
            self._connection: AsyncConnection[FromEngine] = await AsyncConnection.open(
                sock, FromEngine, self._on_message, self._on_socket_closed
            )
        except BaseException:
            self._signal_group(signal.SIGKILL)
            self._process.wait()
            raise
        self._connection.send(Open(spec, arena.fd, arena.size))

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    def infer(self, requests: list[Request]) -> None:
        """Send a batch."""
        self._connection.send(Infer(requests))

    def abort(self, row: int) -> None:
        """Have the engine abort a row."""
        self._connection.send(Abort(row))

    def dump_stacks(self) -> None:
        """Have the process write the stacks of its threads to its log."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGUSR2)  # Popen.send_signal might reap it, which only `_reap` may do

    async def memory(self) -> int:
        """Return the bytes of private memory that the process and its descendants use."""
        return await asyncio.to_thread(memory_of, self.pid)

    def kill(self, reason: str, summary: str = "") -> None:
        """Kill the process and all that it started. `exited` follows.

        Args:
            reason: Why, for the message of the exit.
            summary: The exit in a few words; by default derived from the reason.
        """
        if self._killed_at is None:
            self._killed_at, self._kill_reason, self._kill_summary = time.monotonic(), reason, summary
        self._signal_group(signal.SIGKILL)
        self._start_reaping()

    async def close(self) -> None:
        """End the process, by force if necessary, and return when it has exited."""
        self._connection.close()
        if not self.started.done():
            self.kill("it was not needed any more")  # it does not read the socket while it loads a model
        self._start_reaping()  # the socket may stay open until the process has read all of it
        await asyncio.shield(self.exited)

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Answers(responses):
                self._on_answers(responses)
            case Alive():
                self._on_alive(message)
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
            case StartRefused():
                self._fail_start(message.as_error())
                self._connection.close()

    def _fail_start(self, error: Exception) -> None:
        for future in (self.resolved, self.started):
            if not future.done():
                future.set_exception(error)
                future.exception()  # mark it as retrieved: nobody may be awaiting it

    def _signal_group(self, number: signal.Signals) -> None:
        if self._process.returncode is None:  # once reaped, its id and its group's may belong to others
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    def _on_socket_closed(self) -> None:
        """Handle the end of the socket: the process has exited, or is about to."""
        self._socket_closed.set()
        self._start_reaping()

    def _start_reaping(self) -> None:
        self.gone = True
        if self._reaping is None:
            self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        """Wait for the exit and set the futures. Polls: a thread in waitpid could be blocked for ever."""
        leave_by = time.monotonic() + LEAVE_SECONDS
        while (pid := await self._survivor()) is not None:
            now = time.monotonic()
            if pid == self.pid and self._killed_at is None and now > leave_by:
                self.kill(f"it was still running {LEAVE_SECONDS:g} s after its socket was closed")
            if now > (self._killed_at or leave_by) + UNKILLABLE_SECONDS:
                exited: EngineExited = Unkillable(pid, state_of(pid), UNKILLABLE_SECONDS)
                logger.error("%s", exited)
                break
            await asyncio.sleep(_POLL_SECONDS)
        else:
            exited = self._diagnoser.diagnose(self._process.wait(), self._kill_reason, self._kill_summary)
            with suppress(TimeoutError):  # a process outside its group may hold the socket open
                async with asyncio.timeout(1):
                    await self._socket_closed.wait()  # its last answers arrive before that
        self._connection.close()
        self._fail_start(exited)
        if not self.exited.done():
            self.exited.set_result(exited)

    async def _survivor(self) -> int | None:
        """Return the process, or else another of its group, if alive. None: all have exited; it is not reaped yet."""
        try:
            exit_status = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)  # noqa: ASYNC222 - no wait
        except ChildProcessError:  # reaped by another part of this program: the watchdog ends the group
            return None
        return self.pid if exit_status is None else await asyncio.to_thread(end_group, self.pid)
