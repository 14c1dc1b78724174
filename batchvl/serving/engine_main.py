"""An engine's process: one engine, fed from a socket, doing nothing else.

Started by `EngineProcess` as `python -m batchvl.serving.engine_main SOCKET LIFELINE PARENT` (two descriptors and the
runner's process id). It leads a group of processes, over which a guardian watches.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress

from ..engines.base import Engine
from ..engines.registry import ENGINE_TYPES
from ..errors import UsageError
from ..ipc.arena import ArenaView
from ..ipc.channel import AsyncConnection
from ..ipc.spawn import die_with_parent
from ..ipc.watchdog import start_watchdog
from ..types import Request
from .messages import Abort, Alive, Answers, Infer, ModelResolved, Note, Open, Started, StartRefused, ToEngine

logger = logging.getLogger("batchvl.serving.engine_main")

ALIVE_SECONDS = 0.25
"""How often progress and waits for rows are told, where there are some."""


class NoteHandler(logging.Handler):
    """Forward log records to the runner as `Note` messages. Any thread may log.

    Args:
        send: Sends a message; called on the event loop on which the handler was made.
    """

    def __init__(self, send: Callable[[Note], None]) -> None:
        super().__init__(logging.INFO)
        self._send, self._loop = send, asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note = Note(self.format(record), record.levelno)
        except Exception:
            self.handleError(record)
            return
        with suppress(RuntimeError):  # the loop is closed: the process is about to exit
            self._loop.call_soon_threadsafe(self._send, note)


async def serve(sock: socket.socket) -> int:
    """Drives the engine until the runner closes the socket; the process's exit code."""
    inbox: asyncio.Queue[ToEngine | None] = asyncio.Queue()
    channel: AsyncConnection[ToEngine] = await AsyncConnection.open(
        sock, ToEngine, inbox.put_nowait, lambda: inbox.put_nowait(None)
    )
    first = await inbox.get()
    assert isinstance(first, Open)
    logging.getLogger("batchvl").addHandler(NoteHandler(channel.send))
    logging.getLogger("batchvl").setLevel(logging.INFO)
    try:
        engine = ENGINE_TYPES[first.spec.engine].create(first.spec, ArenaView(first.arena_fd, first.arena_size))
        channel.send(ModelResolved(await engine.resolve()))
        info = await engine.start()
        gc.collect()
        gc.freeze()  # half a million objects of libraries, which else are looked through while rows wait
        channel.send(Started(info))
    except UsageError as error:
        channel.send(StartRefused(type(error).__name__, str(error)))
        await inbox.get()  # the runner closes once it has read that
        return 2
    async with asyncio.TaskGroup() as lists:
        tasks = {lists.create_task(_tell_alive(engine, channel))}
        while True:
            match await inbox.get():
                case Infer(requests):
                    tasks.add(answering := lists.create_task(_answer(engine, requests, channel)))
                    answering.add_done_callback(tasks.discard)
                case Abort(row):
                    await engine.abort(row)
                case None:
                    break
        for task in tasks:
            task.cancel()  # nobody waits for what is still open
    await engine.close()
    return 0


async def _answer(engine: Engine, requests: list[Request], channel: AsyncConnection[ToEngine]) -> None:
    """One list. What finishes in the same turn of the loop leaves in one message."""
    ready = Answers([])
    loop = asyncio.get_running_loop()

    def send() -> None:
        channel.send(ready)
        ready.responses.clear()

    async for response in engine.infer(requests):
        if not ready.responses:
            loop.call_soon(send)
        ready.responses.append(response)


async def _tell_alive(engine: Engine, channel: AsyncConnection[ToEngine]) -> None:
    steps, waited = engine.steps, 0.0
    while True:
        await asyncio.sleep(ALIVE_SECONDS)
        progress, waits = engine.steps != steps, engine.wait_seconds
        if progress or waits != waited:
            steps, waited = engine.steps, waits
            channel.send(Alive(progress, waits))


def main() -> None:
    sock, lifeline, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    _guardian = start_watchdog(lifeline)
    os.close(lifeline)
    os.set_inheritable(sock, False)  # what the engine starts is not to keep the runner from seeing it end
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # how the runner asks a hung engine where it stands
    code = asyncio.run(serve(socket.socket(fileno=sock)))
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(Exception):
        os._exit(code)  # threads of the engine's libraries must not hold it up


if __name__ == "__main__":
    main()
