"""The rows that wait for an engine, and which of several replicas is handed which of them."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from ..types import Request, Response
from .client import EngineClient
from .in_flight import Pending

LINGER_SECONDS = 0.005
"""How long an incomplete list waits for more rows while an engine has room."""


class Dispatcher:
    """All replicas' rows, in one line: each list goes to the replica that holds the fewest rows and has room for it.

    `feeds` are the replicas' own. `only` is one of them while no other is to be handed rows.
    """

    def __init__(self) -> None:
        self._waiting: deque[Pending] = deque()
        self._lingering: asyncio.TimerHandle | None = None
        self.feeds: list[EngineClient] = []
        self.only: EngineClient | None = None
        self.answers = 0
        """How many rows any of them has answered."""

    def add(self, request: Request) -> asyncio.Future[Response]:
        """A row that waits from now on, and its answer."""
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        self._pump()
        return answer

    def changed(self, answers: int = 0) -> None:
        """An engine may have room that had none, perhaps since it has answered so many rows."""
        if answers:
            self.answers += answers
            now = time.monotonic()
            for feed in self.feeds:
                feed.uptime.answered(now)
        self._pump()

    def release(self, error: Exception) -> None:
        """No engine will come: this is what the rows that wait are told."""
        waiting, self._waiting = self._waiting, deque()
        for _, answer in waiting:
            if not answer.done():
                answer.set_exception(error)

    def _pump(self, lingered: bool = False) -> None:
        """Hands over lists while there is room for them; an incomplete one only after a moment's wait for more.

        What counts is rows, not lists: of a list whose rows are answered but one, only that one takes up room.
        """
        while self._waiting:
            feeds = [self.only] if self.only is not None else self.feeds
            free = [feed for feed in feeds if feed.has_room(len(self._waiting))]
            if not free:
                return
            feed = min(free, key=lambda feed: len(feed.rows.held))
            if len(self._waiting) < feed.list_size and not lingered:
                if self._lingering is None:
                    self._lingering = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._pump_lingered)
                return
            if feed.tries_one:
                self._waiting.rotate(len(self._waiting) // 2)  # one of their middle: the first are who is suspected
            self._hand(feed)

    def _pump_lingered(self) -> None:
        self._lingering = None
        self._pump(lingered=True)

    def _hand(self, feed: EngineClient) -> None:
        rows: list[Pending] = []
        while self._waiting and len(rows) < feed.list_size:
            row = self._waiting.popleft()
            if not row[1].done():  # else nobody waits for it
                rows.append(row)
        if rows:
            now = time.monotonic()
            for each in self.feeds:
                each.uptime.listed(now)
            feed.send(rows, now)
