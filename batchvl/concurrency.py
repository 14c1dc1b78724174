"""asyncio building blocks that the standard library lacks."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from .errors import BatchvlError

T = TypeVar("T")
P = ParamSpec("P")

_COLLECTION_OBJECTS = 20_000
"""Number of new objects after which the garbage collector looks for cycles among them."""
_IDLE_SECONDS = 10.0
_STACK_BYTES = 512 * 1024
"""Of a daemon thread: reserved rather than used, but the default of 8 MiB is much for hundreds of them."""


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


class DaemonThreadExecutor(Executor):
    """Threads that do not keep the process from exiting, such as for a file system or a name server that may hang.

    The interpreter waits for those of a `ThreadPoolExecutor` when it exits.

    Args:
        max_workers: Number of threads. They are started as needed, and end when idle.
        name: Name of the threads.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers, self._name = max_workers, name
        self._calls: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._changed = threading.Condition()
        self._threads = self._idle = 0
        self._is_closed = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call a function in a thread. See `concurrent.futures.Executor.submit`."""
        future: Future[T] = Future()
        with self._changed:
            self._calls.append((future, partial(fn, *args, **kwargs)))
            if self._idle >= len(self._calls):
                self._changed.notify()
            elif self._threads < self._max_workers:
                with suppress(RuntimeError):  # the system allows no more threads: the next that is free takes the call
                    _start_thread(self._run, self._name)
                    self._threads += 1
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let threads end as soon as there are no more calls. See `concurrent.futures.Executor.shutdown`.

        Args:
            wait: Has no effect.
            cancel_futures: Cancel the calls that wait for a thread.
        """
        with self._changed:
            self._is_closed = True
            while cancel_futures and self._calls:
                self._calls.popleft()[0].cancel()
            self._changed.notify_all()

    def _run(self) -> None:
        while self._call_next():
            pass

    def _call_next(self) -> bool:
        """Call what is next. Return False if the thread is to end. No reference to a call outlives it."""
        if (waiting := self._next()) is None:
            return False
        future, call = waiting
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)
        return True

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        """Return the next call, or None if the thread is to end."""
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._calls or self._is_closed, _IDLE_SECONDS)
            self._idle -= 1
            if self._calls:
                return self._calls.popleft()
            self._threads -= 1
            return None


_stack_size = threading.Lock()
"""The stack size of new threads is a setting of the process."""


def _start_thread(target: Callable[[], None], name: str) -> None:
    with _stack_size:
        before = threading.stack_size(_STACK_BYTES)
        try:
            threading.Thread(target=target, name=name, daemon=True).start()
        finally:
            threading.stack_size(before)


def main_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the error that ended a group of tasks: a BatchvlError, if there is one."""
    leaves = list(_leaves(group))
    return next((error for error in leaves if isinstance(error, BatchvlError)), leaves[0])


def _leaves(error: BaseException) -> Iterable[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error


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
        return _run(work)
    with ThreadPoolExecutor(1, "batchvl") as executor:
        future = executor.submit(_run, work)
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                with suppress(RuntimeError):
                    interrupt()


def _run(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    import uvloop  # here, because commands that run no loop start faster without it

    with _rare_collections(), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work())


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector run rarely, and not look at what is loaded.

    Rows that wait for images are thousands of objects and no garbage. To look at all of them for each few hundred new
    objects took a fifth of the fetcher's CPU.
    """
    thresholds, is_frozen = gc.get_threshold(), gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECTION_OBJECTS, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if not is_frozen:
            gc.unfreeze()
