"""The encoded images in the arena: those that rows use, and those that rows may use again.

An image takes room once its length is known; until then its bytes are in private memory, also bounded. An image that no
row uses stays in the arena until its room is needed or it is too old, so a URL in rows far apart is fetched once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence

from ..ipc.arena import Arena, ArenaView
from ..types import Extent

MAX_AGE_SECONDS = 600.0
"""Time for which an image is used again."""
_PRIVATE_SHARE = 4
"""Images of unknown length may take one part in so many of the arena's size in private memory."""
_GUESS_BYTES = 256 * 1024
"""Size of an image before any has arrived."""
_SAFETY = 1.5
"""Ratio of the room that is kept for an image on its way and the mean size."""
_WEIGHT = 0.02
"""Weight of the latest image in the mean size."""


class NoRoom(Exception):
    """There is no room for an image now.

    Args:
        needed: Bytes to reserve before another attempt.
    """

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


def max_private_bytes(arena: Arena) -> int:
    """Return how many bytes of private memory the images of unknown length may take, for this arena."""
    return arena.size // _PRIVATE_SHARE


class PrivateMemory:
    """Counts the bytes of images of unknown length.

    Args:
        size: Limit.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used = size, 0


class CachedImage:
    """An image in the arena."""

    __slots__ = ("extent", "key", "time", "users")

    def __init__(self, key: str, extent: Extent, time: float) -> None:
        self.key, self.extent, self.time = key, extent, time
        self.users = 0
        """Rows that need the image to stay."""


class ImageCache:
    """The ledger of the images in an arena.

    Args:
        arena: Arena of encoded images, of which nobody else reserves anything.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.memory = PrivateMemory(max_private_bytes(arena))
        """Of the images of unknown length that are arriving."""
        self._unused: OrderedDict[str, CachedImage] = OrderedDict()  # least recently used first
        self._unused_bytes = 0
        self._used: dict[str, CachedImage] = {}
        self._mean_bytes = float(_GUESS_BYTES)

    @property
    def usual_bytes(self) -> float:
        """Bytes to expect of an image whose length is unknown."""
        return self._mean_bytes * _SAFETY

    @property
    def available_bytes(self) -> int:
        """Bytes that are free, or would be for others' need."""
        return self.arena.free_blocks * self.arena.block_bytes + self._unused_bytes - self.private_bytes

    @property
    def private_bytes(self) -> int:
        """Bytes of images of unknown length that are arriving."""
        return self.memory.used

    @property
    def max_private_bytes(self) -> int:
        return self.memory.size

    def reserve(self, sizes: Sequence[int]) -> list[Extent] | None:
        """Allocate extents of these sizes in bytes, all or none, at the expense of images that no row uses.

        Return None if there is no room now.
        """
        while (extents := self.arena.reserve_now(sizes)) is None:
            if not self._unused:
                return None
            self._drop(next(iter(self._unused)))
        return extents

    def add(self, key: str, extent: Extent, now: float) -> CachedImage:
        """Add an image that is complete. The caller calls `use` for each of its users in the same step."""
        self._mean_bytes += _WEIGHT * (extent.length - self._mean_bytes)
        if key in self._unused:  # too old, and in use when the download began
            self._drop(key)
        image = self._used[key] = CachedImage(key, extent, now)
        return image

    def find(self, key: str, now: float) -> CachedImage | None:
        """Return an image if it is there and not too old."""
        image = self._used.get(key) or self._unused.get(key)
        if image is not None and now - image.time > MAX_AGE_SECONDS:
            if not image.users:
                self._drop(key)
            return None
        return image

    def use(self, image: CachedImage) -> None:
        """Add a user, for which the image stays until `release`."""
        if not image.users and self._unused.pop(image.key, None) is not None:
            self._unused_bytes -= self.room(image.extent.length)
            self._used[image.key] = image
        image.users += 1

    def release(self, image: CachedImage) -> None:
        """Remove a user."""
        image.users -= 1
        if image.users:
            return
        if self._used.get(image.key) is image:
            del self._used[image.key]
            self._unused[image.key] = image
            self._unused_bytes += self.room(image.extent.length)
        else:  # a newer one has taken its place
            self.arena.release(image.extent)

    def clear(self) -> None:
        """Free the room of all images that no row uses."""
        while self._unused:
            self._drop(next(iter(self._unused)))

    def _drop(self, key: str) -> None:
        image = self._unused.pop(key)
        self._unused_bytes -= self.room(image.extent.length)
        self.arena.release(image.extent)

    def room(self, length: int) -> int:
        """Return the bytes of the blocks that an image of this length takes."""
        return -(-max(1, length) // self.arena.block_bytes) * self.arena.block_bytes


class Receiver(ABC):
    """Takes the bytes of one image from a client: into room in the arena, or into private memory if there is none yet.

    Args:
        arena: Where the image goes.
        memory: Limit of images of unknown length.
        max_bytes: Limit of the image's bytes; the caller has checked that no more are written.
        extent: Room that was reserved for it, if any.
    """

    def __init__(self, arena: ArenaView, memory: PrivateMemory, max_bytes: int, extent: Extent | None) -> None:
        self._arena, self._memory, self._max_bytes, self._extent = arena, memory, max_bytes, extent
        self._private: bytearray | None = None
        self.length = 0
        """Bytes written so far."""
        self.may_be_kept = False
        """Whether the image may be kept on a disk, by what its server says."""

    @abstractmethod
    async def open(self, length: int | None) -> None:
        """Prepare for an image of this length in bytes; None if it is unknown. Raises NoRoom."""

    def write(self, chunk: bytes | memoryview) -> None:
        """Append bytes. Raises NoRoom."""
        start, end = self.length, self.length + len(chunk)
        if self._private is not None:
            if self._memory.used + len(chunk) > self._memory.size:
                raise self._outgrown(end)
            self._memory.used += len(chunk)
            self._private += chunk
        else:
            if self._extent is None or end > self._extent.length:
                raise self._outgrown(end)
            self._arena.at(self._extent)[start:end] = chunk
        self.length = end

    def discard(self) -> None:
        """Free the private memory that the image takes, if any."""
        if self._private is not None:
            self._memory.used -= len(self._private)
            self._private = None

    def _outgrown(self, length: int) -> NoRoom:
        """Return that there is no room, with a guess of what an image takes that has at least so many bytes."""
        return NoRoom(max(length, min(2 * length, self._max_bytes, self._arena.size)))


class ImageBuffer(Receiver):
    """The `Receiver` in the runner, which reserves room itself.

    Args:
        cache: Where the image goes.
        max_bytes: Limit of the image's bytes; the caller has checked that no more are written.
        reserved: Room that was reserved for it, if any.
    """

    def __init__(self, cache: ImageCache, max_bytes: int, reserved: Extent | None = None) -> None:
        super().__init__(cache.arena, cache.memory, max_bytes, reserved)
        self._cache = cache

    @property
    def extent(self) -> Extent | None:
        """The room that it has."""
        return self._extent

    async def open(self, length: int | None) -> None:
        """See `begin`."""
        self.begin(length)

    def begin(self, length: int | None) -> None:
        """Prepare for an image of this length in bytes; None if it is unknown. Raises NoRoom."""
        if self._extent is not None:
            if length is None:
                return
            if length <= self._extent.length:
                self._extent = self._cache.arena.shrink(self._extent, length)
                return
            self.discard()
        if length is None:
            self._private = bytearray()
            return
        extents = self._cache.reserve([length])
        if extents is None:
            raise NoRoom(length)
        [self._extent] = extents

    def written(self, length: int) -> None:
        """Record that another process has written the first `length` bytes of its room."""
        if self._extent is None or length > self._extent.length:
            raise ValueError(f"{length} bytes were written to {self._extent}")
        self.length = length

    def finish(self) -> Extent:
        """Return the extent with the image's bytes, which is the caller's from now on. Raises NoRoom."""
        if self._private is not None:
            extents = self._cache.reserve([self.length])
            if extents is None:
                raise NoRoom(self.length)
            [extent] = extents
            self._cache.arena.at(extent)[:] = self._private
            self.discard()
            return extent
        if self._extent is None:
            raise ValueError("no image has begun")
        extent, self._extent = self._cache.arena.shrink(self._extent, self.length), None
        return extent

    def discard(self) -> None:
        """Free what the image takes, if anything."""
        super().discard()
        if self._extent is not None:
            self._cache.arena.release(self._extent)
            self._extent = None
