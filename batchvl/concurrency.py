"""asyncio building blocks that the standard library lacks."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ByteSemaphore:
    """A semaphore that counts bytes and serves its waiters in order of arrival.

    Small amounts never overtake a large one, so the large one cannot starve. For use on one event loop.

    Args:
        size: Bytes in total. A larger amount counts as `size`: it is granted once nothing else is held.
    """

    def __init__(self, size: int) -> None:
        self._free = self._size = size
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def acquire(self, amount: int) -> None:
        """Wait until `amount` bytes are free, and take them."""
        amount = min(amount, self._size)
        if not self._waiters and amount <= self._free:
            self._free -= amount
            return
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append((amount, granted))
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self._free += amount  # granted in the same iteration of the loop as the cancellation
            self._wake_waiters()
            raise

    def release(self, amount: int) -> None:
        """Return bytes that `acquire` took."""
        self._free += min(amount, self._size)
        self._wake_waiters()

    def _wake_waiters(self) -> None:
        while self._waiters:
            amount, granted = self._waiters[0]
            if not granted.done():
                if amount > self._free:
                    return
                self._free -= amount
                granted.set_result(None)
            self._waiters.popleft()


class SharedTask(Generic[T]):
    """A value that several users share: made for the first `get`, released with the last `release`.

    Every user receives the exception that `make` raises. If all users are cancelled while `make` runs, so is `make`.

    Args:
        users: Number of users. Each calls `get` at most once and `release` exactly once.
        make: Makes the value.
        release: Called with the value after the last user's `release`, unless `make` failed.

    >>> async def example() -> list[int]:
    ...     async def make() -> list[int]:
    ...         return [7]
    ...     released: list[int] = []
    ...     shared = SharedTask(2, make, released.extend)
    ...     for _ in range(2):
    ...         assert await shared.get() == [7] and not released
    ...         shared.release()
    ...     return released
    >>> asyncio.run(example())
    [7]
    """

    def __init__(self, users: int, make: Callable[[], Coroutine[Any, Any, T]], release: Callable[[T], None]) -> None:
        self._users = self._remaining = users
        self._make, self._release_value = make, release
        self._task: asyncio.Task[T] | None = None
        self._value: tuple[T] | None = None

    async def get(self) -> T:
        """Return the value, made if need be. The caller must call `release` afterwards, even if this raises."""
        if self._users == 1:  # no need for a task of its own
            self._value = (await self._make(),)
            return self._value[0]
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._make())
        return await asyncio.shield(self._task)

    def release(self) -> None:
        """Report that one user is done with the value."""
        self._remaining -= 1
        if self._remaining:
            return
        task = self._task
        if task is not None and not task.done():
            task.cancel()
        elif task is not None and not task.cancelled() and task.exception() is None:
            self._value = (task.result(),)
        if self._value is not None:
            self._release_value(self._value[0])


def run_sync(work: Callable[[], Coroutine[Any, Any, T]], interrupt: Callable[[], None]) -> T:
    """Run a coroutine to completion in an event loop of its own.

    If this thread already runs a loop, as in a notebook, the coroutine runs in another thread. A KeyboardInterrupt,
    which is how a notebook stops a cell, then calls `interrupt` in this thread.

    Args:
        work: Returns the coroutine. Called in the thread that runs it, so no coroutine is left unawaited.
        interrupt: Asks the coroutine's loop to stop. It may raise, which ends the wait; a RuntimeError (the loop has
            already closed) is ignored.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work())
    with ThreadPoolExecutor(1, "batchvl") as executor:
        future = executor.submit(lambda: asyncio.run(work()))
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                with suppress(RuntimeError):
                    interrupt()
