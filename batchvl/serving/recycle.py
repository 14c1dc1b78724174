"""How much memory an engine's processes may hold before they are started afresh."""

from __future__ import annotations

import logging
import time

from ..hardware.limits import memory

logger = logging.getLogger(__name__)

LEAST_STARTS = 10
LEAST_UP_SECONDS = 300.0
"""A process is not replaced for its memory before it was up so many times as long as it took to start, or so long."""
_MOST = 0.9
"""Share of the memory above which a process is replaced however new it is: the kernel would not ask."""
_LEAST_GAIN = 1.25
"""A process may always hold so many times what it held when it had started: else a new one would be no better."""


class RecyclePolicy:
    """The limit of `--engine-memory`, in bytes, lifted where a new process would soon be where the old one was.

    Each cause is logged once. The memory there is, each of the replicas has its part of.
    """

    def __init__(self, asked: int | None, name: str = "the engine", replicas: int = 1) -> None:
        self._memory = memory() // replicas
        self._asked = asked if asked is not None else self._memory * 3 // 4
        self.bytes = self._asked
        self._name = name
        self._told: set[str] = set()
        self._settled = 0.0

    def started(self, held: int, seconds: float) -> None:
        """Takes what a process holds that has just started, and how long that took."""
        self.bytes = self._asked
        self._settled = time.monotonic() + max(LEAST_UP_SECONDS, LEAST_STARTS * seconds)
        if self.bytes < _LEAST_GAIN * held:
            self._lift(held, "from its start on")

    def exceeded(self, held: int) -> bool:
        """Whether a process that holds so much is to be replaced. Not where that comes too soon."""
        if held <= self.bytes:
            return False
        if time.monotonic() >= self._settled or held > _MOST * self._memory:
            return True
        self._lift(held, "soon after its start")
        return False

    def _lift(self, held: int, when: str) -> None:
        self.bytes = int(_LEAST_GAIN * held)
        if when not in self._told:
            self._told.add(when)
            logger.info(
                f"note: {self._name} holds {format_bytes(held)} of memory {when}: it is started afresh at "
                f"{format_bytes(self.bytes)}, not at {format_bytes(self._asked)} (--engine-memory)"
            )


def format_bytes(size: int) -> str:
    """A number of bytes as people read it.

    >>> format_bytes(13_207_024_435), format_bytes(734_003_200)
    ('12.3 GiB', '700 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
