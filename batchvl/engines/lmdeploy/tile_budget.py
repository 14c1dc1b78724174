"""Memory for pictures' tiles in the engine's process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...concurrency import ByteSemaphore

PICTURE_BYTES = 16 * 2**20
"""What a picture's tiles are taken for until the first is seen: InternVL's 13 in two bytes a number."""


class TileBudget(ByteSemaphore):
    """The budget of tiles, from LMDeploy's preparation of a row to its answer. For one event loop."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._largest = PICTURE_BYTES
        self._seen = False

    async def take_pictures(self, count: int) -> int:
        """Takes room for so many pictures; how many bytes, to be given back."""
        amount = count * self._largest
        await self.acquire(amount)
        return amount

    def settle(self, taken: int, prepared: Any) -> int:
        """Gives back what a prepared request's tiles do not need of `taken`; how many bytes are still out.

        What the largest picture takes is what the next rows' are taken for.
        """
        sizes = [_bytes(item) for item in prepared.inputs.get("multimodal") or []]
        if largest := max(sizes, default=0):
            self._largest = max(largest, self._largest) if self._seen else largest
            self._seen = True
        needed = min(sum(sizes), taken)
        self.release(taken - needed)
        return needed


def _bytes(item: Any) -> int:
    values = item.values() if isinstance(item, Mapping) else ()  # transformers' BatchFeature is one, and no dict
    return sum(int(value.nbytes) for value in values if hasattr(value, "nbytes"))
