"""An amount of bytes that may be out at once."""

from __future__ import annotations

import asyncio


class Budget:
    """Bytes that somebody takes and gives back; who finds too few left waits. For one event loop.

    size: all there is. An amount larger than that may be out alone.
    """

    def __init__(self, size: int) -> None:
        self._left = self._size = size
        self._changed = asyncio.Event()

    async def take(self, amount: int) -> None:
        """Returns once `amount` bytes are the caller's."""
        while self._left < min(amount, self._size):
            self._changed.clear()
            await self._changed.wait()
        self._left -= min(amount, self._size)

    def give(self, amount: int) -> None:
        """Gives back what was taken."""
        self._left += min(amount, self._size)
        self._changed.set()
