"""The rows inside one engine: the future of each one's response, and its deadline."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import RowTimeout
from ..types import Failure, Request, Response


class Pending(NamedTuple):
    """A request that no engine has received yet, and the future of its response."""

    request: Request
    answer: asyncio.Future[Response]


class InFlightRow:
    """A row inside an engine. Times are on the monotonic clock."""

    __slots__ = ("aborted", "answer", "deadline", "sent", "timed_out")

    def __init__(self, answer: asyncio.Future[Response], sent: float, deadline: float) -> None:
        self.answer, self.sent, self.deadline = answer, sent, deadline
        self.aborted = self.timed_out = False


class InFlight:
    """The rows inside one engine, by number. `len` and `in` work; callers pass the current time.

    Args:
        timeout: Seconds that a row may be in the engine.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._rows: dict[int, InFlightRow] = {}
        self.row_seconds = 0.0
        """Seconds that answered rows were in the engine, summed over the rows."""

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def __getitem__(self, row: int) -> InFlightRow:
        return self._rows[row]

    def add(self, batch: Sequence[Pending], now: float) -> None:
        """Add rows that the engine receives now."""
        deadline = now + self._timeout
        for request, answer in batch:
            self._rows[request.row] = InFlightRow(answer, now, deadline)

    def complete(self, response: Response, now: float) -> None:
        """Resolve a row's future. A row that has timed out fails, whatever its response."""
        row = self._rows.pop(response.row, None)
        if row is None:
            return
        self.row_seconds += now - row.sent
        if row.timed_out:
            text = f"the row was in the engine for longer than {self._timeout:g} s (--row-timeout)"
            response = Response(response.row, failure=Failure.of(RowTimeout(text)))
        if not row.answer.done():
            row.answer.set_result(response)

    def overdue(self, now: float) -> Iterator[tuple[int, InFlightRow]]:
        """Yield the rows that are past their deadline."""
        return ((number, row) for number, row in self._rows.items() if now > row.deadline)

    def fail(self, error: Exception) -> None:
        """Remove all rows and raise an error in their futures."""
        rows, self._rows = self._rows, {}
        for row in rows.values():
            if not row.answer.done():
                row.answer.set_exception(error)
