"""The main module of an engine's process, which runs one engine and does nothing else.

`EngineProcess` starts it as `python -m batchvl.serving.engine_main SOCKET PARENT_PIPE PARENT`: two file descriptors and
the runner's process id. The process leads a process group, which a watchdog ends together with it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import socket
import sys
from contextlib import suppress

from ..engines.base import Engine
from ..engines.registry import ENGINE_TYPES
from ..errors import UsageError
from ..ipc.arena import ArenaView
from ..ipc.channel import AsyncConnection
from ..ipc.notes import forward_notes
from ..ipc.spawn import die_with_parent
from ..ipc.watchdog import start_watchdog
from ..types import Request
from .messages import Abort, Alive, Answers, Infer, ModelResolved, Open, ProtocolError, Started, StartRefused
from .messages import ToEngine as Message

ALIVE_SECONDS = 0.25
"""Seconds between heartbeats."""


async def serve(sock: socket.socket) -> int:
    """Run the engine until the runner closes the socket. Return the process's exit code."""
    inbox: asyncio.Queue[Message | None] = asyncio.Queue()
    connection: AsyncConnection[Message] = await AsyncConnection.open(
        sock, Message, inbox.put_nowait, lambda: inbox.put_nowait(None)
    )
    first = await inbox.get()
    if first is None:
        return 0
    if not isinstance(first, Open):
        raise ProtocolError(f"the first message is {type(first).__name__}, expected Open")
    forward_notes(connection.send)
    try:
        engine = ENGINE_TYPES[first.spec.engine].create(first.spec, ArenaView(first.arena_fd, first.arena_size))
        connection.send(ModelResolved(await engine.resolve()))
        info = await engine.start()
    except UsageError as error:
        connection.send(StartRefused.of(error))
        await inbox.get()  # the runner closes the socket once it has read the refusal
        return 2
    gc.collect()
    gc.freeze()  # half a million objects of libraries, which the collector would otherwise scan while rows wait
    connection.send(Started(info))
    await _answer_batches(engine, inbox, connection)
    await engine.close()
    return 0


async def _answer_batches(
    engine: Engine, inbox: asyncio.Queue[Message | None], connection: AsyncConnection[Message]
) -> None:
    """Answer batches, several concurrently, until the socket is closed."""
    async with asyncio.TaskGroup() as batches:
        tasks = {batches.create_task(_send_heartbeats(engine, connection))}
        while (message := await inbox.get()) is not None:
            match message:
                case Infer(requests):
                    task = batches.create_task(_answer_batch(engine, requests, connection))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                case Abort(row):
                    await engine.abort(row)
                case Open():
                    raise ProtocolError("a second Open message")
        for task in tasks:
            task.cancel()  # nobody reads these answers


async def _answer_batch(engine: Engine, requests: list[Request], connection: AsyncConnection[Message]) -> None:
    """Answer one batch. Responses that are ready in the same iteration of the event loop share a message."""
    ready = Answers([])
    loop = asyncio.get_running_loop()

    def send() -> None:
        connection.send(ready)
        ready.responses.clear()

    async for response in engine.infer(requests):
        if not ready.responses:
            loop.call_soon(send)
        ready.responses.append(response)


async def _send_heartbeats(engine: Engine, connection: AsyncConnection[Message]) -> None:
    """Report progress and waits for rows, if there are any, every ALIVE_SECONDS."""
    steps, waited = engine.steps, 0.0
    while True:
        await asyncio.sleep(ALIVE_SECONDS)
        progress, wait_seconds = engine.steps != steps, engine.wait_seconds
        if progress or wait_seconds != waited:
            steps, waited = engine.steps, wait_seconds
            connection.send(Alive(progress, wait_seconds))


def main() -> None:
    """Run the process."""
    sock, parent_pipe, parent = map(int, sys.argv[1:])
    die_with_parent(parent)
    _watchdog = start_watchdog(parent_pipe)
    os.close(parent_pipe)
    os.set_inheritable(sock, False)  # else a child of the engine would keep the runner from noticing its exit
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # for `EngineProcess.dump_stacks`
    code = asyncio.run(serve(socket.socket(fileno=sock)))
    sys.stdout.flush()
    sys.stderr.flush()
    with suppress(Exception):
        os._exit(code)  # threads of the engine's libraries must not delay the exit


if __name__ == "__main__":
    main()
