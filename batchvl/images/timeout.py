"""A deadline that leaves out the waiting that is ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import aiohttp


class PausableTimeout:
    """So many seconds of a task's time; `async with clock.timeout` raises TimeoutError once they are used up.

    While it is stopped, for as long as the task queues for something of ours, no time passes.
    """

    def __init__(self, seconds: float) -> None:
        self.timeout = asyncio.timeout(seconds)
        self._left: float | None = None

    @property
    def left(self) -> float:
        """Seconds, while it runs."""
        if self._left is not None:
            return self._left
        when = self.timeout.when()
        assert when is not None
        return when - asyncio.get_running_loop().time()

    def stop(self) -> None:
        if self._left is None:
            self._left = self.left
            self.timeout.reschedule(None)

    def go(self) -> None:
        if self._left is not None:
            self.timeout.reschedule(asyncio.get_running_loop().time() + self._left)
            self._left = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.stop()
        try:
            yield
        finally:
            self.go()


def pause_while_queued() -> aiohttp.TraceConfig:
    """Stops a request's clock, its `trace_request_ctx`, while it queues for a connection of the session's limits."""

    async def stop(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: Any) -> None:
        context.trace_request_ctx.stop()

    async def go(session: aiohttp.ClientSession, context: SimpleNamespace, parameters: Any) -> None:
        context.trace_request_ctx.go()

    trace = aiohttp.TraceConfig()
    trace.on_connection_queued_start.append(stop)
    trace.on_connection_queued_end.append(go)
    return trace
