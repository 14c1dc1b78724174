"""A row's room in the arena of encoded bytes.

A row reserves all it may need at once, before its first byte, and from then on only gives back: so no two rows can
wait for each other. How much a web picture needs is known late, so at first it is `--max-image-bytes`, and less once
the server has told the length. Where a row's pictures at that size would take more than half the arena, they get equal
shares of that half; a picture that then turns out larger than its share makes the row give everything back and start
once more, with the sizes that are known by now. A row that has but one picture to fetch gives its room back while it
waits for a retry; one that has several keeps it, or it would have to fetch again what it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ipc.arena import Arena
from ..types import Extent, InlineImage, WebImage


class ImageBuffers:
    """One extent for each picture of a row that is no file: all of them, or none."""

    def __init__(self, arena: Arena, pictures: Sequence[WebImage | InlineImage], max_image_bytes: int) -> None:
        self.pictures, self.extents = pictures, list[Extent]()
        self._arena, self._max = arena, max_image_bytes
        self._lengths = [len(picture.data) if isinstance(picture, InlineImage) else None for picture in pictures]
        self._sizes = self._shares(rows=2)

    async def hold(self) -> None:
        """Waits for room, unless the row has it, and copies inline pictures there. Raises TooLarge."""
        if self.extents or not self.pictures:
            return
        self.extents = await self._arena.reserve(self._sizes)
        for place, picture in enumerate(self.pictures):
            if isinstance(picture, InlineImage):
                self.view(place)[:] = picture.data

    def view(self, place: int) -> memoryview:
        """Where the bytes of a picture go."""
        return self._arena.at(self.extents[place])

    def expect(self, place: int, length: int) -> bool:
        """Notes a picture's length and gives back what it does not need; False where it needs more than it has."""
        self._lengths[place] = length
        if length > self.extents[place].length:
            return False
        self.extents[place] = self._arena.shrink(self.extents[place], length)
        return True

    def forget(self, place: int) -> None:
        """A picture is longer than an attempt before told: its length is not known any more."""
        if isinstance(self.pictures[place], WebImage):
            self._lengths[place] = None

    def widen(self) -> None:
        """Gives everything back and divides the arena anew, knowing what is known by now."""
        self.drop()
        self._sizes = self._shares(rows=1)

    def drop(self) -> None:
        """Gives back what is held; without effect where nothing is."""
        extents, self.extents = self.extents, []
        self._arena.release(*extents)

    def _shares(self, rows: int) -> list[int]:
        """Bytes for each picture: its length, or an equal part of 1/`rows` of what those with a length leave."""
        block = self._arena.block_bytes
        unknown = sum(length is None for length in self._lengths)
        left = self._arena.blocks - sum(-(-length // block) for length in self._lengths if length is not None)
        share = min(self._max, max(1, left // (rows * max(1, unknown))) * block)
        return [share if length is None else length for length in self._lengths]
