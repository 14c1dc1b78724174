"""Waiting for asynchronous work where a caller wants its result, in a notebook as well."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


def block_on(work: Callable[[], Coroutine[Any, Any, T]], interrupted: Callable[[], None]) -> T:
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
