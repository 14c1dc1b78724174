"""The bytes of images in a fetch process: in private memory, or in room that the runner grants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ...ipc.arena import ArenaView
from ...types import Extent
from ..image_cache import NoRoom, PrivateMemory, Receiver


class RemoteBuffer(Receiver):
    """The `Receiver` in a fetch process, which asks the runner for room.

    Args:
        arena: Where the image goes.
        memory: Limit of images of unknown length, for all of the process.
        max_bytes: Limit of the image's bytes; the caller has checked that no more are written.
        extent: Room that was reserved for it, if any.
        ask: Asks the runner for room of a length. `grant` is called with the answer.
    """

    def __init__(
        self,
        arena: ArenaView,
        memory: PrivateMemory,
        max_bytes: int,
        extent: Extent | None,
        ask: Callable[[int], object],
    ) -> None:
        super().__init__(arena, memory, max_bytes, extent)
        self._ask = ask
        self._answer: asyncio.Future[Extent | None] | None = None

    async def open(self, length: int | None) -> None:
        """Prepare for an image of this length in bytes; None if it is unknown. Raises NoRoom."""
        if self._extent is not None and (length is None or length <= self._extent.length):
            return
        if length is None:
            self._private = bytearray()
        else:
            self._extent = await self._room(length)

    async def finish(self) -> None:
        """See that all bytes are in the arena. Raises NoRoom."""
        if self._private is not None:
            extent = await self._room(self.length)
            self._arena.at(extent)[: self.length] = self._private

    def grant(self, extent: Extent | None) -> None:
        """Take the runner's answer: room, or None if there is none."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(extent)

    async def _room(self, length: int) -> Extent:
        self._answer = asyncio.get_running_loop().create_future()
        self._ask(length)
        extent = await self._answer
        if extent is None:
            raise NoRoom(length)
        return extent
