"""Answers in one piece from LMDeploy's PyTorch engine.

It takes no notice of `stream_output`: whoever waits for an answer is woken again and again and has the new tokens made
text, one waiter every tenth of a millisecond, on the one thread that launches the GPU's work as well. Each time all of
the answer so far is told, so the last time is enough.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from lmdeploy.messages import ResponseType
from lmdeploy.pytorch.engine.engine_instance import EngineInstance


def disable_streaming(sessions: Any) -> None:
    """Has the handles of LMDeploy's SessionManager honour `stream_output`, its PyTorch engine's own. TurboMind's do."""
    for handle in sessions.request_handle_pool.handles:
        if isinstance(handle, EngineInstance):
            _Whole(handle)


class _Whole:
    def __init__(self, handle: EngineInstance) -> None:
        self._infer, self._receive = handle.async_stream_infer, handle.req_sender.async_recv
        self._stream = True
        handle.async_stream_infer = self.async_stream_infer
        handle.req_sender.async_recv = self.async_recv

    def async_stream_infer(self, *args: Any, stream_output: bool = True, **settings: Any) -> AsyncIterator[Any]:
        self._stream = stream_output  # a handle has one answer at a time
        found: AsyncIterator[Any] = self._infer(*args, stream_output=stream_output, **settings)
        return found

    async def async_recv(self, response: Any, wait_main: bool = False) -> Any:
        """LMDeploy's, which has `wait_main` set for what is part of an answer and for nothing else."""
        if not wait_main or self._stream:
            return await self._receive(response, wait_main)
        if not response.event.is_set():
            response.event = _Last(response)
        return await self._receive(response)


class _Last(asyncio.Event):
    """Set once a response is not going to grow."""

    def __init__(self, response: Any) -> None:
        super().__init__()
        self._response = response

    def set(self) -> None:
        if self._response.type is not ResponseType.SUCCESS:
            super().set()
