"""Rows that an engine died over: kept aside, and tried again in ever smaller groups until the culprit is alone."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from ..serving.exits import EngineExited
from ..types import Row

ROWS, BYTES = 4096, 256 * 2**20
"""So many rows, or picture bytes that they carry, are tried again before all others, since they stay in memory."""
DEATHS = 2


class PoisonRow(NamedTuple):
    """A row that an engine died over while it had nothing else, and not for the first time."""

    row: Row
    died: EngineExited
    deaths: int


class PoisonBisector:
    """Who is blamed for which death, and which group is tried next."""

    def __init__(self) -> None:
        self._blamed: dict[EngineExited, list[Row]] = {}
        self._rows = self._bytes = 0
        self._groups: deque[list[Row]] = deque()
        self._deaths: Counter[int] = Counter()

    def blame(self, row: Row, died: EngineExited) -> None:
        """The row was in the engine when it died."""
        self._blamed.setdefault(died, []).append(row)
        self._rows += 1
        self._bytes += row.inline_bytes

    @property
    def full(self) -> bool:
        """Whether there are too many to leave them for later."""
        return self._rows > ROWS or self._bytes > BYTES

    def sift(self) -> tuple[list[PoisonRow], bool]:
        """Splits the rows blamed since the last call into groups; the culprits among them, and whether that was
        progress: a group became smaller, or a culprit was found.
        """
        culprits, progress = [], False
        for died, rows in self._blamed.items():
            self._deaths.update(row.number for row in rows)
            deaths = self._deaths[rows[0].number]
            if len(rows) > 1:
                middle = len(rows) // 2
                self._groups += (rows[:middle], rows[middle:])
                progress = True
            elif deaths < DEATHS or died.answered:
                self._groups.appendleft(rows)  # alone in a new process: if that dies too, nothing else can have done it
            else:
                culprits.append(PoisonRow(rows[0], died, deaths))
                progress = True
        self._blamed.clear()
        self._rows = self._bytes = 0
        return culprits, progress

    def next_group(self) -> list[Row] | None:
        """The rows to try next, with nothing else in the engine."""
        return self._groups.popleft() if self._groups else None
