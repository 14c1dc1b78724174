"""A fetch process as the runner sees it: start it, have it request images, and start another one when it dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, NamedTuple

from ...errors import ConnectionFailed, EngineLost
from ...ipc.channel import AsyncConnection
from ...ipc.notes import Note
from ...ipc.spawn import ParentPipe, exit_reason, spawn_with_socket
from ..client import Visit
from ..http import TransientError
from ..image_cache import ImageBuffer, NoRoom
from .messages import Arrived, Cancel, Failed, FromProcess, Get, Outcome, Redirected, Room, RoomNeeded, Setup

logger = logging.getLogger(__name__)

MAX_DEATHS = 10
"""Deaths in a row, without a request that was completed between them, that end the run."""
_GRACE_SECONDS = 30.0
"""Seconds for which a request may take longer than its time limit before its process counts as stuck."""
_CANCEL_SECONDS = 10.0
"""The same for a request that was cancelled."""
_CHECK_SECONDS = 1.0


class Launch(NamedTuple):
    """What every fetch process is started with."""

    setup: Setup
    parent_pipe: ParentPipe
    environment: Mapping[str, str]
    log: IO[bytes]
    """File for the output."""


class _Request:
    """A request that a process is at.

    Args:
        buffer: Has the room for the image.
        outcome: Resolves with the last message about the request, or with why there is none.
        due: Time at which it should long have ended.
    """

    __slots__ = ("buffer", "due", "has_ended", "outcome")

    def __init__(self, buffer: ImageBuffer, outcome: asyncio.Future[Outcome | Exception], due: float) -> None:
        self.buffer, self.outcome, self.due = buffer, outcome, due
        self.has_ended = False

    def end(self, outcome: Outcome | Exception) -> None:
        self.has_ended = True
        if not self.outcome.done():  # else its task has just been cancelled
            self.outcome.set_result(outcome)


class FetchProcess:
    """A process that requests images, and its successors if it dies. For one event loop, the running one.

    A request ends only once the process writes nothing to its room any more: it has said so, or it is dead.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch, self._loop = launch, asyncio.get_running_loop()
        self._requests: dict[int, _Request] = {}
        self._next_number = 0
        self._connection: AsyncConnection[FromProcess] | None = None
        self._unsent: dict[int, Get] = {}
        """What to send to the next process, by number."""
        self._deaths = 0
        self._lost: EngineLost | None = None
        """Why no process is started any more."""
        self._is_closing = self._was_late = False
        self._replacing: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Start the process. Raises EngineLost."""
        await self._start()
        self._timer = self._loop.call_later(_CHECK_SECONDS, self._check)

    async def close(self) -> None:
        """End the process."""
        self._is_closing = True
        if self._timer is not None:
            self._timer.cancel()
        if self._replacing is not None:
            await asyncio.gather(self._replacing, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
            await self._end_process()

    @property
    def pid(self) -> int:
        return self._process.pid

    async def get(self, visit: Visit, buffer: ImageBuffer, seconds: float, *, close: bool) -> Visit | None:
        """See `HttpClient.get`. Raises EngineLost if the process dies again and again."""
        if self._lost is not None:
            raise self._lost
        number, self._next_number = self._next_number, self._next_number + 1
        request = _Request(buffer, self._loop.create_future(), self._loop.time() + seconds + _GRACE_SECONDS)
        get = Get(number, visit, seconds, close, buffer.extent)
        self._requests[number] = request
        if self._connection is None:
            self._unsent[number] = get
        else:
            self._connection.send(get)
        try:
            outcome = await request.outcome
        except asyncio.CancelledError:
            await self._take_back(number, request)
            raise
        match outcome:
            case Arrived(_, length, may_be_kept):
                buffer.written(length)
                buffer.may_be_kept = may_be_kept
                return None
            case Redirected(_, visit):
                return visit
            case Failed():
                raise outcome.as_error()
            case Exception():
                raise outcome
        raise RuntimeError(f"a request ended with {outcome}")

    async def _take_back(self, number: int, request: _Request) -> None:
        """Cancel a request, and wait until the process has written its last byte to its room."""
        if request.has_ended:
            return
        if self._unsent.pop(number, None) is not None:
            del self._requests[number]
            return
        outcome = request.outcome = self._loop.create_future()
        request.due = self._loop.time() + _CANCEL_SECONDS
        self._send(Cancel(number))
        while not outcome.done():
            with suppress(asyncio.CancelledError):  # the room is not free before, whoever else is impatient
                await asyncio.wait([outcome])

    def _on_message(self, message: FromProcess) -> None:
        match message:
            case RoomNeeded(number, length):
                self._give_room(number, length)
            case Note(text, level):
                logger.log(level, "%s", text)
            case _:
                self._deaths = 0
                self._requests.pop(message.request).end(message)

    def _give_room(self, number: int, length: int) -> None:
        buffer = self._requests[number].buffer
        try:
            buffer.begin(length)
        except NoRoom:
            self._send(Room(number, None))
        else:
            self._send(Room(number, buffer.extent))

    def _send(self, message: Room | Cancel) -> None:
        if self._connection is not None:
            self._connection.send(message)

    async def _start(self) -> None:
        launch = self._launch
        fds = [launch.setup.arena[0]]
        try:
            self._process, sock = spawn_with_socket(
                "batchvl.fetching.processes.main", launch.parent_pipe, fds, launch.environment, launch.log
            )
        except OSError as error:
            raise EngineLost(f"cannot start a fetch process: {error.strerror}") from None
        try:
            connection: AsyncConnection[FromProcess] = await AsyncConnection.open(
                sock, FromProcess, self._on_message, self._on_lost
            )
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        connection.send(launch.setup)
        for get in self._unsent.values():
            connection.send(get)
        self._unsent.clear()
        self._connection = connection

    def _on_lost(self) -> None:
        """Handle the end of the process. Requests from now on are for its successor."""
        self._connection = None
        if not self._is_closing:
            orphans, self._requests = list(self._requests.values()), {}
            self._replacing = self._loop.create_task(self._replace(orphans))

    async def _replace(self, orphans: list[_Request]) -> None:
        """Start another process, once this one is dead for certain."""
        reason = await self._end_process()
        self._deaths += 1
        for request in orphans:
            request.end(TransientError(ConnectionFailed(f"the process that fetched the image ended ({reason})")))
        log = self._launch.log.name
        if self._deaths >= MAX_DEATHS:
            self._give_up(
                EngineLost(
                    f"a fetch process ended {self._deaths} times without completing a request ({reason}); see {log}"
                )
            )
            return
        logger.warning(f"a fetch process ended ({reason}); starting another one. Its output is in {log}")
        try:
            await self._start()
        except EngineLost as error:
            self._give_up(error)

    async def _end_process(self) -> str:
        """Kill the process if it is alive, and return how it ended."""
        self._process.kill()
        return exit_reason(await asyncio.to_thread(self._process.wait))

    def _give_up(self, error: EngineLost) -> None:
        self._lost = error
        requests, self._requests = self._requests, {}
        for request in requests.values():
            request.end(error)

    def _check(self) -> None:
        """Kill the process if it is stuck: a request is due, and still is at the next check."""
        now = self._loop.time()
        is_late = any(now > request.due for request in self._requests.values())
        if is_late and self._was_late and self._connection is not None:
            logger.warning("a fetch process does not respond: killing it")
            self._process.kill()  # `_on_lost` follows
        self._was_late = is_late
        self._timer = self._loop.call_later(_CHECK_SECONDS, self._check)
