"""asyncio primitives that the standard library lacks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByteSemaphore:
    """Bytes that somebody takes and gives back; who finds too few left waits, first come, first served: a large amount
    is not passed by small ones for ever. For one event loop.

    size: all there is. An amount larger than that may be out alone.
    """

    def __init__(self, size: int) -> None:
        self._left = self._size = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, amount: int) -> None:
        """Returns once `amount` bytes are the caller's."""
        amount = min(amount, self._size)
        if not self._waiting and amount <= self._left:
            self._left -= amount
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._left += amount  # it was given in the same moment
            self._serve()
            raise

    def give(self, amount: int) -> None:
        """Gives back what was taken."""
        self._left += min(amount, self._size)
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.done():
                if amount > self._left:
                    return
                self._left -= amount
                turn.set_result(None)
            self._waiting.popleft()


class SharedTask(Generic[T]):
    """A thing that so many `users` get once each: made for the first who comes, let go of when the last is done.

    What `make` raises, every user gets. Where all users are cancelled while it is made, so is that.

    >>> async def example() -> list[int]:
    ...     async def make() -> list[int]:
    ...         return [7]
    ...     gone: list[int] = []
    ...     shared = SharedTask(2, make, gone.extend)
    ...     for _ in range(2):
    ...         assert await shared.get() == [7] and not gone
    ...         shared.done()
    ...     return gone
    >>> asyncio.run(example())
    [7]
    """

    def __init__(self, users: int, make: Callable[[], Coroutine[Any, Any, T]], let_go: Callable[[T], None]) -> None:
        self._users = self._left = users
        self._make, self._let_go = make, let_go
        self._making: asyncio.Task[T] | None = None
        self._made: tuple[T] | None = None

    async def get(self) -> T:
        """The thing. Whoever asks for it calls `done` afterwards, whatever came of it."""
        if self._users == 1:  # a task of its own would be for nothing
            self._made = (await self._make(),)
            return self._made[0]
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make())
        return await asyncio.shield(self._making)

    def done(self) -> None:
        """A user needs it no more."""
        self._left -= 1
        if self._left:
            return
        making = self._making
        if making is not None and not making.done():
            making.cancel()
        elif making is not None and not making.cancelled() and making.exception() is None:
            self._made = (making.result(),)
        if self._made is not None:
            self._let_go(self._made[0])


def run_sync(work: Callable[[], Coroutine[Any, Any, T]], interrupted: Callable[[], None]) -> T:
    """Does the work in an event loop of its own and returns its result, or raises what it raises.

    Where this thread has a running loop already, as in a notebook, the work has a thread of its own. A
    KeyboardInterrupt, which is a notebook's way to stop a cell, then calls `interrupted`, in this thread: that may tell
    the work's loop to end, and raise something, but for RuntimeError (of a loop that has ended).
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1, "batchvl") as thread:
        running = thread.submit(lambda: asyncio.run(work()))  # made there: work that never starts is none
        while True:
            try:
                return running.result()
            except KeyboardInterrupt:
                with suppress(RuntimeError):
                    interrupted()
