"""The request handles of LMDeploy: answers in one piece from those of its PyTorch engine, and how many are free.

The PyTorch engine ignores `stream_output`: whoever waits for an answer is woken again and again to turn new tokens into
text, one every tenth of a millisecond, in the thread that also launches the GPU's work. Each output holds the whole
answer so far, so the last one is enough.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.engine.engine_instance import EngineInstance

from ..base import Stopwatch

CHECK_SECONDS = 0.1
"""How often `IdleMeter` checks the handles."""
QUEUE_SECONDS = 0.5
"""Time after which rows in LMDeploy's queue are taken to wait for memory. A new row waits there only for the next round
of the scheduler, so a queue that is never empty for this long holds rows that the engine cannot compute."""


def disable_streaming(sessions: Any) -> None:
    """Make the handles of LMDeploy's PyTorch engine honour `stream_output`, as TurboMind's do.

    Args:
        sessions: LMDeploy's SessionManager.
    """
    for handle in sessions.request_handle_pool.handles:
        if isinstance(handle, EngineInstance):
            _WholeAnswers(handle)


class _WholeAnswers:
    """Replaces two methods of a handle so that it is woken only once per answer, unless the answer is streamed."""

    def __init__(self, handle: EngineInstance) -> None:
        self._infer, self._receive = handle.async_stream_infer, handle.req_sender.async_recv
        self._stream = True
        handle.async_stream_infer = self.async_stream_infer
        handle.req_sender.async_recv = self.async_recv

    def async_stream_infer(self, *args: Any, stream_output: bool = True, **settings: Any) -> AsyncIterator[Any]:
        self._stream = stream_output  # a handle has one answer at a time
        outputs: AsyncIterator[Any] = self._infer(*args, stream_output=stream_output, **settings)
        return outputs

    async def async_recv(self, response: Any, wait_main: bool = False) -> Any:
        """LMDeploy's method, whose `wait_main` is set for parts of an answer and for nothing else."""
        if not wait_main or self._stream:
            return await self._receive(response, wait_main)
        if not response.event.is_set():
            response.event = _FinalEvent(response)
        return await self._receive(response)


class _FinalEvent(asyncio.Event):
    """Set once a response does not grow any more."""

    def __init__(self, response: Any) -> None:
        super().__init__()
        self._response = response

    def set(self) -> None:
        if self._response.type is not ResponseType.SUCCESS:
            super().set()


class IdleMeter:
    """Measures how long half of LMDeploy's handles are free while no row waits for memory.

    A row has a handle from the end of its preparation to its last token. With half of its rows LMDeploy is nearly as
    fast as with all (docs/performance.md: 5 to 10 % slower), and rows of many tiles may be limited to that by the
    arena, with the GPU fully busy.

    Args:
        engine: LMDeploy's AsyncEngine.
        sessions: LMDeploy's SessionManager.
    """

    def __init__(self, engine: Any, sessions: Any) -> None:
        self._engine, self._pool = engine, sessions.request_handle_pool
        self._idle = Stopwatch()

    @property
    def seconds(self) -> float:
        """Idle time so far; may be read from any thread."""
        return self._idle.seconds

    async def run(self) -> None:
        """Measure until cancelled, on the pipeline's event loop."""
        queue_empty = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if not (await self._engine.get_schedule_metrics()).waiting_seqs:
                    queue_empty = now
                half_free = 2 * self._pool.num_dispatched < self._pool.size
                self._idle.running(half_free and now - queue_empty < QUEUE_SECONDS)
                await asyncio.sleep(CHECK_SECONDS)
        finally:
            self._idle.running(False)
