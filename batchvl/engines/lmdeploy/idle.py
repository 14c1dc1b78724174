"""How long LMDeploy was short of rows."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from ..base import Stopwatch

if TYPE_CHECKING:
    from .model import LoadedModel

LOOK_SECONDS = 0.1
QUEUE_SECONDS = 0.5
"""A new row waits in LMDeploy's queue for the next round of its scheduler. A queue that is never empty for so long is
one for memory: the rows in it are what the engine cannot compute."""


class IdleMeter:
    """Looks, now and then, whether half of LMDeploy's handles are free and no row waits for memory.

    A row has a handle from the end of its preparation to its last token. Half of the rows is what it computes nearly as
    fast with (docs/performance.md: a twentieth slower to a tenth), and what rows of many tiles may be kept to by the
    arena, with the GPU as busy as can be.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._engine, self._pool = model.engine, model.sessions.request_handle_pool
        self._room = Stopwatch()

    @property
    def seconds(self) -> float:
        """So far; may be read from any thread."""
        return self._room.seconds

    async def look(self) -> None:
        """Keeps looking, on the pipeline's loop."""
        empty = time.monotonic()
        try:
            while True:
                now = time.monotonic()
                if not (await self._engine.get_schedule_metrics()).waiting_seqs:
                    empty = now
                self._room.running(2 * self._pool.num_dispatched < self._pool.size and now - empty < QUEUE_SECONDS)
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._room.running(False)
