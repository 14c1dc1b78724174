"""A timeout that does not count the time in which a task waits for resources of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp


class PausableTimeout:
    """A timeout for a task: `async with pausable.timeout` raises TimeoutError after `seconds` without the pauses.

    Must be created in the running event loop. Starts at once.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + seconds
        self._left_at_pause: float | None = None
        self.timeout = asyncio.timeout_at(self._deadline)

    @property
    def seconds_left(self) -> float:
        if self._left_at_pause is not None:
            return self._left_at_pause
        return self._deadline - self._loop.time()

    def pause(self) -> None:
        """Stop the clock. Without effect if it is paused."""
        if self._left_at_pause is None:
            self._left_at_pause = self.seconds_left
            self.timeout.reschedule(None)

    def resume(self) -> None:
        """Let the clock run on. Without effect if it is not paused."""
        if self._left_at_pause is not None:
            self._deadline = self._loop.time() + self._left_at_pause
            self._left_at_pause = None
            self.timeout.reschedule(self._deadline)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Pause the timeout for the length of a block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()


def pause_while_queued() -> aiohttp.TraceConfig:
    """Return a trace that pauses a request's timeout while the request waits for a connection of the session.

    The timeout is the request's `trace_request_ctx`.
    """

    async def pause(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: Any) -> None:
        context.trace_request_ctx.pause()

    async def resume(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: Any) -> None:
        context.trace_request_ctx.resume()

    trace = aiohttp.TraceConfig()
    trace.on_connection_queued_start.append(pause)
    trace.on_connection_queued_end.append(resume)
    return trace
