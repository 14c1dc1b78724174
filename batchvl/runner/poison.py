"""Rows over which an engine died: kept aside, and retried in smaller and smaller groups until the cause is alone.

This is group testing by bisection: each group is halved until a single row is left.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from ..serving.exits import EngineExited
from ..types import Row

MAX_ROWS, MAX_BYTES = 4096, 256 * 2**20
"""With more suspects than this, or more bytes of inline images, they are retried at once: they stay in memory."""
DEATHS = 2


class PoisonRow(NamedTuple):
    """A row that was alone in the engine when it died, and not for the first time."""

    row: Row
    exited: EngineExited
    """The last exit."""
    deaths: int
    """Number of exits that the row was involved in."""


class PoisonBisector:
    """Tracks which rows were in flight in which exit, and which group is retried next."""

    def __init__(self) -> None:
        self._suspects: dict[EngineExited, list[Row]] = {}
        self._rows = self._bytes = 0
        self._groups: deque[list[Row]] = deque()
        self._deaths: Counter[int] = Counter()

    def record_death(self, row: Row, exited: EngineExited) -> None:
        """Note that the row was in flight when the engine exited."""
        self._suspects.setdefault(exited, []).append(row)
        self._rows += 1
        self._bytes += row.inline_bytes

    @property
    def full(self) -> bool:
        """Whether the suspects must be retried before any other rows are admitted."""
        return self._rows > MAX_ROWS or self._bytes > MAX_BYTES

    def split(self) -> tuple[list[PoisonRow], bool]:
        """Split the rows recorded since the last call into groups.

        Returns:
            The poison rows among them, and whether there was progress: a group became smaller, or a poison row was
            found.
        """
        poison, progress = [], False
        for exited, rows in self._suspects.items():
            self._deaths.update(row.number for row in rows)
            deaths = self._deaths[rows[0].number]
            if len(rows) > 1:
                middle = len(rows) // 2
                self._groups += (rows[:middle], rows[middle:])
                progress = True
            elif deaths < DEATHS or exited.answered:
                self._groups.appendleft(rows)  # alone in a new process: if that dies too, the row is to blame
            else:
                poison.append(PoisonRow(rows[0], exited, deaths))
                progress = True
        self._suspects.clear()
        self._rows = self._bytes = 0
        return poison, progress

    def next_group(self) -> list[Row] | None:
        """Return the rows to retry next, with no others in the engine; None if there are none."""
        return self._groups.popleft() if self._groups else None
