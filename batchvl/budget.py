"""An amount of bytes that may be out at once."""

from __future__ import annotations

import asyncio
from collections import deque


class Budget:
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
