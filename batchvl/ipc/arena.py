"""The arena: one block of shared memory for picture bytes and pixels, and the ledger of who holds what.

The memory is a `memfd`: no name, nothing in /dev/shm, given back by the system when the last process that holds it
ends. The runner alone keeps the ledger; children map the memory and read or write where the runner tells them.
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
"""Bytes of a block, unless told otherwise."""
_LEAST, _MOST = 256 * MIB, 8192 * MIB


def default_arena_bytes(engines: int = 1) -> int:
    """Bytes for pictures, encoded and prepared, unless --arena-bytes says how many."""
    return min(max(memory() // 8, _LEAST), _MOST * engines)


class ArenaView:
    """A mapping of the arena's memory, in whichever process holds its descriptor."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd, self.size = fd, size
        self._map = mmap.mmap(fd, size)
        self._view = memoryview(self._map)

    def at(self, extent: Extent) -> memoryview:
        """The extent's bytes, writable and uncopied. Valid until the runner gives the extent to somebody else."""
        return self._view[extent.start : extent.start + extent.length]

    def close(self) -> None:
        """Unmaps the memory, unless somebody still looks at a part of it, and closes the descriptor."""
        self._view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # an array still points into it: the process's end unmaps it
        os.close(self.fd)


class Arena(ArenaView):
    """The runner's side: memory in blocks, and the ledger.

    An extent is a run of whole blocks, first fit. Who finds no room waits in line, and nobody overtakes: with every
    row reserving all it needs at once, and only shrinking afterwards, no two rows can wait for each other.

    blocks: how many; block_bytes: their size, a multiple of 4096.

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
            raise ValueError(f"{blocks} blocks of {block_bytes} bytes: want one or more, of a multiple of {PAGE} bytes")
        fd = os.memfd_create("batchvl-arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, blocks * block_bytes)
        super().__init__(fd, blocks * block_bytes)
        self.blocks, self.block_bytes = blocks, block_bytes
        self._free: list[tuple[int, int]] = [(0, blocks)]  # (first block, how many), sorted, never adjacent
        self._held: dict[int, int] = {}  # first block -> how many
        self._waiting: deque[tuple[list[int], Sequence[int], asyncio.Future[list[Extent]]]] = deque()

    @property
    def free_blocks(self) -> int:
        return sum(count for _, count in self._free)

    async def reserve(self, sizes: Sequence[int]) -> list[Extent]:
        """Extents of at least one byte each, all at once or none; waits for room, first come first served.

        Raises TooLarge where they would not fit the empty arena.
        """
        counts = [-(-max(1, size) // self.block_bytes) for size in sizes]
        if sum(counts) > self.blocks:
            raise TooLarge(
                f"the row needs {sum(sizes):,} bytes of the arena's {self.size:,}: "
                "give it more with --arena-bytes, or fewer or smaller pictures"
            )
        if not self._waiting:
            extents = self._take(counts, sizes)
            if extents is not None:
                return extents
        turn: asyncio.Future[list[Extent]] = asyncio.get_running_loop().create_future()
        entry = (counts, sizes, turn)
        self._waiting.append(entry)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(*turn.result())
            else:
                if entry in self._waiting:  # `_serve` may have found it cancelled already
                    self._waiting.remove(entry)
                self._serve()
            raise

    def reserve_now(self, size: int) -> Extent | None:
        """One extent if there is room for it this moment and nobody waits, else None."""
        extents = None if self._waiting else self._take([-(-max(1, size) // self.block_bytes)], [size])
        return extents[0] if extents else None

    def shrink(self, extent: Extent, length: int) -> Extent:
        """The same extent with only its first `length` bytes (at least one block is kept); the rest is free again."""
        first = extent.start // self.block_bytes
        held, wanted = self._held[first], -(-max(1, length) // self.block_bytes)
        if wanted < held:
            self._held[first] = wanted
            self._give_back(first + wanted, held - wanted)
            self._serve()
        return Extent(extent.start, length)

    def release(self, *extents: Extent) -> None:
        """Gives extents back, once nobody reads or writes them any more: each exactly once."""
        for extent in extents:
            first = extent.start // self.block_bytes
            self._give_back(first, self._held.pop(first))
        self._serve()

    def _serve(self) -> None:
        while self._waiting:
            counts, sizes, turn = self._waiting[0]
            if not turn.done():
                extents = self._take(counts, sizes)
                if extents is None:
                    return
                turn.set_result(extents)
            self._waiting.popleft()

    def _take(self, counts: Sequence[int], sizes: Sequence[int]) -> list[Extent] | None:
        taken: list[Extent] = []
        for count, size in zip(counts, sizes, strict=True):
            at = next((i for i, (_, free) in enumerate(self._free) if free >= count), None)
            if at is None:
                for extent in taken:  # all or nothing
                    first = extent.start // self.block_bytes
                    self._give_back(first, self._held.pop(first))
                return None
            first, free = self._free[at]
            if free == count:
                del self._free[at]
            else:
                self._free[at] = (first + count, free - count)
            self._held[first] = count
            taken.append(Extent(first * self.block_bytes, size))
        return taken

    def _give_back(self, first: int, count: int) -> None:
        at = bisect.bisect_left(self._free, (first, 0))
        if at < len(self._free) and self._free[at][0] == first + count:
            count += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == first:
            before, more = self._free[at - 1]
            self._free[at - 1] = (before, more + count)
        else:
            self._free.insert(at, (first, count))
