"""An engine's process, seen from the runner: started, told, heard, and ended for certain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .. import errors
from ..images.arena import Arena
from ..images.preparation import PreparationSpec
from ..lifeline import Lifeline, spawn
from ..request import Request, Response
from ..wire import Channel
from .death import EngineDied, Witness
from .family import end_group, memory_of
from .messages import Abort, Alive, Answers, FromEngine, Infer, Note, Open, Refused, Resolved, Started
from .protocol import EngineInfo, EngineSpec

__all__ = ["EngineDied", "EngineProcess"]

_LEAVE_SECONDS = 10.0
"""How long a process may live on that has let go of its socket."""


class EngineProcess:
    """One engine process and what it starts, which ends with it.

    `resolved` and `started` are futures; `died` is set once it is reaped.

    `answered` is called with each list of responses, `alive` at every sign of progress, `say` with what it has to tell.
    """

    def __init__(
        self, answered: Callable[[list[Response]], None], alive: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        self.resolved: asyncio.Future[PreparationSpec | None] = loop.create_future()
        self.started: asyncio.Future[EngineInfo] = loop.create_future()
        self.died: asyncio.Future[EngineDied] = loop.create_future()
        self._answered, self._alive, self._say = answered, alive, say
        self._ended_for: str | None = None
        self._how = ""
        self.gone = False
        """Whether nothing can be told to it any more."""

    async def open(
        self, spec: EngineSpec, arena: Arena, lifeline: Lifeline, environment: Mapping[str, str], log: Path
    ) -> None:
        """Starts the process; its output is appended to `log`."""
        ours, theirs = socket.socketpair()
        with theirs, open(log, "ab") as file:  # noqa: ASYNC230 - once a process
            self._witness = Witness(spec.engine, log, file.tell())
            fds = [theirs.fileno(), lifeline.fd, arena.fd]
            arguments = [str(theirs.fileno()), str(lifeline.fd), str(os.getpid())]
            try:
                self._process = spawn("batchvl.engines.child", arguments, fds, environment, file)
            except OSError:
                ours.close()
                raise
        try:
            self._channel: Channel[FromEngine] = await Channel.open(ours, FromEngine, self._received, self._lost)
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
        self._ended_for, self._how = reason, how
        self._signal(signal.SIGKILL)

    async def close(self, seconds: float = 5.0) -> None:
        """Lets the process leave, kills it after `seconds`, and returns when it is gone."""
        self._channel.close()
        if not self.started.done():
            self.kill("it was not needed any more")  # while it loads a model it hears nothing
        done, _ = await asyncio.wait([self.died], timeout=seconds)
        if not done:
            self.kill("it did not leave when told to")
            await asyncio.shield(self.died)

    def _received(self, message: FromEngine) -> None:
        match message:
            case Answers(responses):
                self._answered(responses)
            case Alive():
                self._alive()
            case Note(text):
                self._say(text)
            case Resolved(preparation):
                if not self.resolved.done():
                    self.resolved.set_result(preparation)
            case Started(info):
                if not self.started.done():
                    self.started.set_result(info)
            case Refused(name, text):
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
        """The socket ended, and with it, or soon, the process: wait for it away from the event loop."""
        self.gone = True
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        late = asyncio.get_running_loop().call_later(_LEAVE_SECONDS, self.kill, "it closed its socket and lived on")
        await asyncio.to_thread(self._await_end)
        late.cancel()
        code = self._process.wait()
        died = self._witness.died(code, self._ended_for, self._how)
        for future in (self.resolved, self.started):
            if not future.done():
                future.set_exception(died)
                future.exception()
        if not self.died.done():
            self.died.set_result(died)

    def _await_end(self) -> None:
        with suppress(ChildProcessError):  # reaped by somebody else: the guardian sees to the group
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            end_group(self.pid)
