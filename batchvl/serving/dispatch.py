"""The queue of rows that wait for an engine, and the choice of a replica for each batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from ..types import Request, Response
from .client import EngineClient
from .in_flight import Pending

LINGER_SECONDS = 0.005
"""Seconds for which an incomplete batch waits for more rows while an engine has capacity."""


class Dispatcher:
    """One queue for all replicas: each batch goes to the replica with the fewest rows in flight and capacity for it."""

    def __init__(self) -> None:
        self._pending: deque[Pending] = deque()
        self._linger: asyncio.TimerHandle | None = None
        self.clients: list[EngineClient] = []
        self.only: EngineClient | None = None
        """If set, the single client that receives rows."""
        self.answers = 0
        """Rows answered by all replicas."""

    def submit(self, request: Request) -> asyncio.Future[Response]:
        """Queue a request and return the future of its response."""
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        self._pending.append(Pending(request, answer))
        self._dispatch()
        return answer

    def on_change(self, answers: int = 0) -> None:
        """Dispatch rows after an engine may have gained capacity, perhaps by answering some."""
        if answers:
            self.answers += answers
            now = time.monotonic()
            for client in self.clients:
                client.utilization.on_answers(now)
        self._dispatch()

    def fail(self, error: Exception) -> None:
        """Raise an error in the futures of all rows that are pending: no engine will answer them."""
        pending, self._pending = self._pending, deque()
        for _, answer in pending:
            if not answer.done():
                answer.set_exception(error)

    def _dispatch(self, lingered: bool = False) -> None:
        """Send batches while a replica has capacity; an incomplete batch only after it has waited for more rows.

        Capacity counts rows, not batches: a batch with one unanswered row takes up the capacity of that row only.
        """
        while self._pending:
            clients = [self.only] if self.only is not None else self.clients
            free = [client for client in clients if client.has_capacity(len(self._pending))]
            if not free:
                return
            client = min(free, key=lambda client: len(client.in_flight))
            if len(self._pending) < client.batch_size and not lingered:
                if self._linger is None:
                    self._linger = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._end_linger)
                return
            if client.canary:
                self._pending.rotate(len(self._pending) // 2)  # take one from the middle: the first are suspects
            self._send_batch(client)

    def _end_linger(self) -> None:
        self._linger = None
        self._dispatch(lingered=True)

    def _send_batch(self, client: EngineClient) -> None:
        batch: list[Pending] = []
        size = client.batch_size
        while self._pending and len(batch) < size:
            row = self._pending.popleft()
            if not row.answer.done():  # else the row was cancelled
                batch.append(row)
        if batch:
            now = time.monotonic()
            for each in self.clients:
                each.utilization.on_batch(now)
            client.send(batch, now)
