"""How much memory an engine's processes may hold before they are started afresh."""

from __future__ import annotations

from ..resources import memory

_LEAST_GAIN = 1.25
"""A process may always hold so many times what it held when it had started: else a new one would be no better."""


class MemoryLimit:
    """The limit of `--engine-memory`, lifted where a process needs more from its start on. In bytes."""

    def __init__(self, asked: int | None) -> None:
        self._asked = asked if asked is not None else memory() * 3 // 4
        self.bytes = self._asked
        self._told = False

    def started(self, held: int) -> str | None:
        """Takes what a process holds that has just started; a note for people where that lifts the limit, once."""
        self.bytes = max(self._asked, int(_LEAST_GAIN * held))
        if self.bytes == self._asked or self._told:
            return None
        self._told = True
        return (
            f"note: the engine holds {amount(held)} of memory from its start on: it is started afresh at "
            f"{amount(self.bytes)}, not at {amount(self._asked)} (--engine-memory)"
        )


def amount(size: int) -> str:
    """A number of bytes as people read it.

    >>> amount(13_207_024_435), amount(734_003_200)
    ('12.3 GiB', '700 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
