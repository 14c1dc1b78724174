"""The main module of a fetch process, which requests images for the runner and decides nothing.

`FetchProcess` starts it as `python -m batchvl.fetching.processes.main SOCKET PARENT_PIPE PARENT`: two file descriptors
and the runner's process id.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import sys
from collections.abc import Callable

import msgspec

from ...concurrency import run_sync
from ...config.options import FetchOptions
from ...config.units import Proxy, dec_hook
from ...ipc.arena import ArenaView
from ...ipc.channel import AsyncConnection
from ...ipc.notes import forward_notes
from ...ipc.spawn import watch_parent
from ..host_headers import HostHeaders
from ..image_cache import PrivateMemory
from ..requester import LocalRequester
from .messages import (
    Arrived,
    Cancel,
    Ended,
    Failed,
    FromProcess,
    Get,
    Outcome,
    Redirected,
    Room,
    RoomNeeded,
    Setup,
    ToProcess,
)
from .room import RemoteBuffer


class Requests:
    """The requests of a process. For one event loop, the running one.

    Args:
        setup: What the runner sent first.
        requester: Sends them.
        max_bytes: Limit of an image.
        send: Sends a message to the runner.
    """

    def __init__(
        self, setup: Setup, requester: LocalRequester, max_bytes: int, send: Callable[[FromProcess], object]
    ) -> None:
        self._requester, self._max_bytes, self._send = requester, max_bytes, send
        self._arena, self._memory = ArenaView(*setup.arena), PrivateMemory(setup.private_bytes)
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, tuple[asyncio.Task[Outcome], RemoteBuffer]] = {}

    def handle(self, message: ToProcess) -> None:
        """Do what the runner asks for."""
        match message:
            case Get():
                self._start(message)
            case Room(number, extent):
                if number in self._running:  # else it has ended meanwhile
                    self._running[number][1].grant(extent)
            case Cancel(number):
                if number in self._running:
                    self._running[number][0].cancel()
            case Setup():
                raise RuntimeError("a second Setup message")

    def _start(self, get: Get) -> None:
        number = get.request
        buffer = RemoteBuffer(
            self._arena,
            self._memory,
            self._max_bytes,
            get.extent,
            lambda length: self._send(RoomNeeded(number, length)),
        )
        task = self._loop.create_task(self._request(get, buffer))
        self._running[number] = task, buffer
        # A task that is cancelled before it begins never runs any of its code.
        task.add_done_callback(lambda task: self._end(number, task))

    def _end(self, number: int, task: asyncio.Task[Outcome]) -> None:
        """Report the end of a request, which writes nothing from now on."""
        _, buffer = self._running.pop(number)
        buffer.discard()
        self._send(Ended(number) if task.cancelled() else task.result())

    async def _request(self, get: Get, buffer: RemoteBuffer) -> Outcome:
        number = get.request
        try:
            visit = await self._requester.get(get.visit, buffer, get.seconds, close=get.close)
            if visit is not None:
                return Redirected(number, visit)
            await buffer.finish()
        except Exception as error:
            return Failed.of(number, error)
        return Arrived(number, buffer.length, buffer.may_be_kept)


async def serve(sock: socket.socket) -> None:
    """Request images until the runner closes the socket."""
    inbox: asyncio.Queue[ToProcess | None] = asyncio.Queue()
    connection: AsyncConnection[ToProcess] = await AsyncConnection.open(
        sock, ToProcess, inbox.put_nowait, lambda: inbox.put_nowait(None)
    )
    setup = await inbox.get()
    if setup is None:
        return
    if not isinstance(setup, Setup):
        raise RuntimeError(f"the first message is {type(setup).__name__}, expected Setup")
    forward_notes(connection.send)
    options = _options(setup)
    async with LocalRequester(options, HostHeaders(setup.host_headers)) as requester:
        requests = Requests(setup, requester, int(options.max_image_bytes), connection.send)
        while (message := await inbox.get()) is not None:
            requests.handle(message)


def _options(setup: Setup) -> FetchOptions:
    options = msgspec.msgpack.decode(setup.options, type=FetchOptions, dec_hook=dec_hook)
    return options if setup.proxy is None else dataclasses.replace(options, proxy=Proxy(*setup.proxy))


def main() -> None:
    """Run the process."""
    sock, parent_pipe, parent = map(int, sys.argv[1:])
    watch_parent(parent_pipe, parent)
    run_sync(lambda: serve(socket.socket(fileno=sock)), lambda: None)
    os._exit(0)  # threads that look up names must not delay the exit


if __name__ == "__main__":
    main()
