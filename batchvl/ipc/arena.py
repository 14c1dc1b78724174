"""The arena: a block of shared memory for encoded images and pixels, and the ledger of its allocations.

The memory is a `memfd`: it has no name and takes no space in /dev/shm, and the system frees it when the last process
that holds it ends. Only the runner keeps the ledger. Child processes map the memory, and read and write the extents
that the runner's messages name.
"""

from __future__ import annotations

import asyncio
import bisect
import mmap
import os
from collections import deque
from collections.abc import Sequence

from ..errors import TooLarge
from ..hardware.limits import MIB, memory
from ..types import Extent

PAGE = 4096
BLOCK = 64 * 1024
"""Default size of a block in bytes."""
_MIN_BYTES, _MAX_BYTES = 256 * MIB, 8192 * MIB


def default_arena_bytes(engines: int = 1) -> int:
    """Return the default of `--arena-bytes`: an eighth of the memory, within limits.

    Args:
        engines: Number of replicas.
    """
    return min(max(memory() // 8, _MIN_BYTES), _MAX_BYTES * engines)


class ArenaView:
    """A mapping of the arena's memory, in any process that has its file descriptor.

    Attributes:
        fd: The memfd, which this object owns.
        size: Bytes of the arena.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self._map = mmap.mmap(fd, size)
        self._view = memoryview(self._map)

    def at(self, extent: Extent) -> memoryview:
        """Return the extent's bytes, writable and not copied. They are valid until the runner releases the extent."""
        return self._view[extent.start : extent.start + extent.length]

    def close(self) -> None:
        """Unmap the memory, unless an array still refers to it, and close the file descriptor."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # unmapped when the process ends
        os.close(self.fd)


class Arena(ArenaView):
    """The runner's side of the arena: memory in blocks, and the ledger of who holds them.

    An extent is a run of whole blocks, allocated first fit. Waiters are served in order of arrival. Since each row
    reserves everything it needs in one call and only shrinks it afterwards, no two rows can wait for each other.

    Args:
        blocks: Number of blocks.
        block_bytes: Size of a block, a multiple of 4096.

    Attributes:
        free_blocks: Number of blocks that no extent holds.

    >>> async def example() -> int:
    ...     arena = Arena(blocks=8, block_bytes=4096)
    ...     [extent] = await arena.reserve([5000])
    ...     arena.at(extent)[:5] = b"hello"
    ...     arena.release(extent)
    ...     return arena.free_blocks
    >>> asyncio.run(example())
    8
    """

    def __init__(self, blocks: int, block_bytes: int = BLOCK) -> None:
        if blocks < 1 or block_bytes < PAGE or block_bytes % PAGE:
            raise ValueError(
                f"{blocks} blocks of {block_bytes} bytes: expected at least one block, of a multiple of {PAGE} bytes"
            )
        fd = os.memfd_create("batchvl-arena", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, blocks * block_bytes)
            super().__init__(fd, blocks * block_bytes)
        except OSError:
            os.close(fd)
            raise
        self.blocks, self.block_bytes = blocks, block_bytes
        self._free: list[tuple[int, int]] = [(0, blocks)]  # (first block, count), sorted, never adjacent
        self._allocated: dict[int, int] = {}  # first block -> count
        self.free_blocks = blocks
        self._waiters: deque[tuple[list[int], Sequence[int], asyncio.Future[list[Extent]]]] = deque()

    async def reserve(self, sizes: Sequence[int]) -> list[Extent]:
        """Wait until all of the extents fit, and allocate them.

        Args:
            sizes: Bytes of each extent; 0 counts as 1.

        Raises:
            TooLarge: They would not fit into the empty arena.
        """
        counts = [self._blocks_for(size) for size in sizes]
        if sum(counts) > self.blocks:
            raise TooLarge(
                f"the row needs {sum(sizes):,} bytes of the arena's {self.size:,}: "
                "increase --arena-bytes, or use fewer or smaller images"
            )
        if not self._waiters:
            extents = self._allocate(counts, sizes)
            if extents is not None:
                return extents
        granted: asyncio.Future[list[Extent]] = asyncio.get_running_loop().create_future()
        waiter = (counts, sizes, granted)
        self._waiters.append(waiter)
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.release(*granted.result())
            else:
                if waiter in self._waiters:  # unless `_wake_waiters` has already seen the cancellation
                    self._waiters.remove(waiter)
                self._wake_waiters()
            raise

    def reserve_now(self, sizes: Sequence[int]) -> list[Extent] | None:
        """Allocate extents without waiting. Return None if they do not fit or others are waiting."""
        return None if self._waiters else self._allocate([self._blocks_for(size) for size in sizes], sizes)

    def shrink(self, extent: Extent, length: int) -> Extent:
        """Free the blocks behind the first `length` bytes of an extent, and return the shorter extent.

        At least one block is kept.
        """
        first = extent.start // self.block_bytes
        count, needed = self._allocated[first], self._blocks_for(length)
        if needed < count:
            self._allocated[first] = needed
            self._free_blocks(first + needed, count - needed)
            self._wake_waiters()
        return Extent(extent.start, length)

    def release(self, *extents: Extent) -> None:
        """Free extents that no process reads or writes any more, each exactly once."""
        for extent in extents:
            first = extent.start // self.block_bytes
            self._free_blocks(first, self._allocated.pop(first))
        self._wake_waiters()

    def _blocks_for(self, size: int) -> int:
        return -(-max(1, size) // self.block_bytes)

    def _wake_waiters(self) -> None:
        while self._waiters:
            counts, sizes, granted = self._waiters[0]
            if not granted.done():
                extents = self._allocate(counts, sizes)
                if extents is None:
                    return
                granted.set_result(extents)
            self._waiters.popleft()

    def _allocate(self, counts: Sequence[int], sizes: Sequence[int]) -> list[Extent] | None:
        """Allocate extents of `counts` blocks and `sizes` bytes: all of them, or none and return None."""
        extents: list[Extent] = []
        for count, size in zip(counts, sizes, strict=True):
            index = next((i for i, (_, free) in enumerate(self._free) if free >= count), None)
            if index is None:
                for extent in extents:
                    first = extent.start // self.block_bytes
                    self._free_blocks(first, self._allocated.pop(first))
                return None
            first, free = self._free[index]
            if free == count:
                del self._free[index]
            else:
                self._free[index] = (first + count, free - count)
            self._allocated[first] = count
            self.free_blocks -= count
            extents.append(Extent(first * self.block_bytes, size))
        return extents

    def _free_blocks(self, first: int, count: int) -> None:
        """Add a run of blocks to the free list, merged with the runs before and behind it."""
        self.free_blocks += count
        index = bisect.bisect_left(self._free, (first, 0))
        if index < len(self._free) and self._free[index][0] == first + count:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == first:
            before, before_count = self._free[index - 1]
            self._free[index - 1] = (before, before_count + count)
        else:
            self._free.insert(index, (first, count))
