"""The rows that one engine holds: who waits for each, and how long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

from ..errors import RowTimeout
from ..types import Failure, Request, Response

Pending = tuple[Request, asyncio.Future[Response]]
"""A row on its way into an engine, and its answer."""


class InFlightRow:
    """A row in the engine: who waits for it, since when it is there, and its deadline, on the monotonic clock."""

    __slots__ = ("aborted", "answer", "deadline", "sent", "timed_out")

    def __init__(self, answer: asyncio.Future[Response], sent: float, deadline: float) -> None:
        self.answer, self.sent, self.deadline = answer, sent, deadline
        self.aborted = self.timed_out = False


class InFlight:
    """Rows are `held` from when the engine is handed them until they are answered; by number. Times are passed in."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.held: dict[int, InFlightRow] = {}
        self.seconds = 0.0
        """That rows were in the engine, summed over the rows."""

    def hold(self, rows: Sequence[Pending], now: float) -> None:
        """These are in the engine from now on."""
        for request, answer in rows:
            self.held[request.row] = InFlightRow(answer, now, now + self._timeout)

    def answered(self, response: Response, now: float) -> None:
        """A held row's response; one that comes after the row's deadline is a failure."""
        row = self.held.pop(response.row, None)
        if row is None:
            return
        self.seconds += now - row.sent
        if row.timed_out:
            text = f"the row was longer than {self._timeout:g} s in the engine (--row-timeout)"
            response = Response(response.row, failure=Failure.of(RowTimeout(text)))
        if not row.answer.done():
            row.answer.set_result(response)

    def overdue(self, now: float) -> Iterator[tuple[int, InFlightRow]]:
        """Held rows that are past their deadline."""
        return ((number, row) for number, row in self.held.items() if now > row.deadline)

    def give_back(self, error: Exception) -> None:
        """The engine holds nothing any more: this is what became of the rows."""
        held, self.held = self.held, {}
        for row in held.values():
            if not row.answer.done():
                row.answer.set_exception(error)
