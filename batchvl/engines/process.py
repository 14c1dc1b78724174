"""An engine's process, seen from the runner: started, told, heard, and ended for certain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from .. import errors
from ..images.arena import Arena
from ..images.preparation import PreparationSpec
from ..lifeline import Lifeline, spawn
from ..request import Request, Response
from ..wire import Channel
from .messages import Abort, Alive, Answers, FromEngine, Infer, Open, Refused, Resolved, Started
from .protocol import EngineInfo, EngineSpec

_LAST_WORDS = 2000


class EngineDied(Exception):
    """The engine's process ended; the message tells how, with its last words."""

    answered = 0
    """How many rows the process had answered before."""


class EngineProcess:
    """One engine process. `resolved` and `started` are futures; `died` is set once it is reaped.

    `answered` is called with each list of responses, `alive` at every sign of progress.
    """

    def __init__(self, answered: Callable[[list[Response]], None], alive: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        self.resolved: asyncio.Future[PreparationSpec | None] = loop.create_future()
        self.started: asyncio.Future[EngineInfo] = loop.create_future()
        self.died: asyncio.Future[EngineDied] = loop.create_future()
        self._answered, self._alive = answered, alive
        self._killed_for: str | None = None
        self.gone = False
        """Whether nothing can be told to it any more."""

    async def open(
        self, spec: EngineSpec, arena: Arena, lifeline: Lifeline, environment: Mapping[str, str], log: Path
    ) -> None:
        """Starts the process; its output is appended to `log`."""
        ours, theirs = socket.socketpair()
        with theirs, open(log, "ab") as file:  # noqa: ASYNC230 - once a process
            self._log, self._log_start = log, file.tell()
            fds = [theirs.fileno(), lifeline.fd, arena.fd]
            arguments = [str(theirs.fileno()), str(lifeline.fd), str(os.getpid())]
            try:
                self._process = spawn("batchvl.engines.child", arguments, fds, environment, file)
            except OSError:
                ours.close()
                raise
        self._channel: Channel[FromEngine] = await Channel.open(ours, FromEngine, self._received, self._lost)
        self._channel.send(Open(spec, arena.fd, arena.size))

    def infer(self, requests: list[Request]) -> None:
        self._channel.send(Infer(requests))

    def abort(self, row: int) -> None:
        self._channel.send(Abort(row))

    def dump_stacks(self) -> None:
        """Has the process write where each of its threads stands to its log."""
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGUSR2)

    def kill(self, reason: str) -> None:
        """Ends the process now; `died` follows, with this reason."""
        self._killed_for = reason
        with suppress(ProcessLookupError):
            self._process.kill()

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

    def _lost(self) -> None:
        """The socket ended, and with it, or soon, the process: wait for it away from the event loop."""
        self.gone = True
        self._reaping = asyncio.get_running_loop().create_task(self._reap())

    async def _reap(self) -> None:
        try:
            await asyncio.to_thread(self._process.wait, 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)
        code = self._process.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if self._killed_for:
            how = f"was ended: {self._killed_for}"
        error = EngineDied(f"the engine process {how}{self._last_words()}")
        for future in (self.resolved, self.started):
            if not future.done():
                future.set_exception(error)
                future.exception()
        if not self.died.done():
            self.died.set_result(error)

    def _last_words(self) -> str:
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _LAST_WORDS))
            words = file.read().decode("utf-8", "replace").strip()
            if words:
                return f"; its last words, from {self._log}:\n{words}"
        return ""
