"""Space for the encoded images of one row in the arena.

A row reserves all the space it may need before its first byte arrives, and from then on only gives back, so two rows
never wait for each other. The size of a web image is known late: at first it is --max-image-bytes, and less once the
server has sent the length. If a row's images at that size would take more than half of the arena, they get equal
shares of that half. If an image then turns out larger than its share, the row frees everything and starts again with
the sizes that are known by then. A row with a single image to fetch frees its space while it waits for a retry. A row
with several keeps it, or it would have to fetch again what it has.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ipc.arena import Arena
from ..types import Extent, InlineImage, WebImage


class ImageBuffers:
    """One extent for each web or inline image of a row: all of them or none."""

    def __init__(self, arena: Arena, images: Sequence[WebImage | InlineImage], max_image_bytes: int) -> None:
        self.images, self.extents = images, list[Extent]()
        self._arena, self._max_image_bytes = arena, max_image_bytes
        self._lengths = [len(image.data) if isinstance(image, InlineImage) else None for image in images]
        self._sizes = self._divide(rows=2)

    async def allocate(self) -> None:
        """Wait for space and copy the inline images there. Without effect if there is space. Raises TooLarge."""
        if self.extents or not self.images:
            return
        self.extents = await self._arena.reserve(self._sizes)
        for index, image in enumerate(self.images):
            if isinstance(image, InlineImage):
                self.view(index)[:] = image.data

    def view(self, index: int) -> memoryview:
        """Return the space of an image."""
        return self._arena.at(self.extents[index])

    def set_length(self, index: int, length: int) -> bool:
        """Record the length of an image and free what it does not need. Return False if it needs more than it has."""
        self._lengths[index] = length
        if length > self.extents[index].length:
            return False
        self.extents[index] = self._arena.shrink(self.extents[index], length)
        return True

    def forget_length(self, index: int) -> None:
        """Record that an image is longer than an earlier attempt said, so that its length is unknown again."""
        if isinstance(self.images[index], WebImage):
            self._lengths[index] = None

    def reallocate(self) -> None:
        """Free everything, and divide the whole arena by the lengths that are known by now at the next `allocate`."""
        self.free()
        self._sizes = self._divide(rows=1)

    def free(self) -> None:
        """Free the space. Without effect if there is none."""
        extents, self.extents = self.extents, []
        self._arena.release(*extents)

    def _divide(self, rows: int) -> list[int]:
        """Return the bytes for each image.

        That is its length if known. Images of unknown length share 1/`rows` of the rest of the arena equally.
        """
        block = self._arena.block_bytes
        unknown = sum(length is None for length in self._lengths)
        free_blocks = self._arena.blocks - sum(-(-length // block) for length in self._lengths if length is not None)
        share = min(self._max_image_bytes, max(1, free_blocks // (rows * max(1, unknown))) * block)
        return [share if length is None else length for length in self._lengths]
