"""The memory limit at which an engine's process is replaced by a new one."""

from __future__ import annotations

import logging
import time

from ..hardware.limits import memory

logger = logging.getLogger(__name__)

MIN_UP_STARTS = 10
MIN_UP_SECONDS = 300.0
"""A process stays up for at least this long, or for MIN_UP_STARTS times its start-up, before it is recycled."""
MIN_GAIN = 1.25
"""The limit is at least this many times the memory that a new process needs: otherwise a new one gains nothing."""
_MAX_SHARE = 0.9
"""Share of the machine's memory above which even a new process is recycled, before the kernel kills it."""


class RecyclePolicy:
    """The limit of `--engine-memory`, raised where a new process would soon reach it again.

    Args:
        requested: The limit in bytes; None for 3/4 of the replica's share of the memory.
        name: The engine's name in log messages.
        replicas: Number of replicas that share the machine's memory.
    """

    def __init__(self, requested: int | None, name: str = "the engine", replicas: int = 1) -> None:
        self._memory = memory() // replicas
        self._requested = requested if requested is not None else self._memory * 3 // 4
        self.limit = self._requested
        """Bytes."""
        self._name = name
        self._logged: set[str] = set()
        self._recycle_after = 0.0

    def on_start(self, used: int, start_seconds: float) -> None:
        """Reset the limit for a process that has just started.

        Args:
            used: Bytes of memory that the process uses.
            start_seconds: Seconds that it took to start.
        """
        self.limit = self._requested
        self._recycle_after = time.monotonic() + max(MIN_UP_SECONDS, MIN_UP_STARTS * start_seconds)
        if self.limit < MIN_GAIN * used:
            self._raise_limit(used, "right after its start")

    def exceeded(self, used: int) -> bool:
        """Return whether a process that uses this many bytes is to be recycled. Raises the limit if it is too soon."""
        if used <= self.limit:
            return False
        if time.monotonic() >= self._recycle_after or used > _MAX_SHARE * self._memory:
            return True
        self._raise_limit(used, "soon after its start")
        return False

    def _raise_limit(self, used: int, when: str) -> None:
        self.limit = int(MIN_GAIN * used)
        if when not in self._logged:
            self._logged.add(when)
            logger.info(
                f"{self._name} uses {format_bytes(used)} of memory {when}: raising --engine-memory from "
                f"{format_bytes(self._requested)} to {format_bytes(self.limit)} for it"
            )


def format_bytes(size: int) -> str:
    """Format a number of bytes for people.

    >>> format_bytes(13_207_024_435), format_bytes(734_003_200)
    ('12.3 GiB', '700 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
