"""The runner's side of one replica's engine: it sends batches to the current process and tracks each row."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..config.options import EngineOptions
from ..engines.base import EngineInfo
from ..types import Response
from .in_flight import InFlight, Pending
from .messages import Alive
from .process import EngineProcess
from .utilization import UtilizationMeter

logger = logging.getLogger(__name__)

STACKS_SECONDS = 0.5
"""Seconds that a hung process gets to write its stacks before it is killed."""


class EngineClient:
    """Sends rows to one process at a time: the one passed to `open`, until `drain` or `close`.

    Args:
        name: The engine's name in log messages.
        options: Its time limits.
        on_change: Called when the engine may have capacity, with the number of rows that it has just answered.
    """

    def __init__(self, name: str, options: EngineOptions, on_change: Callable[[int], None]) -> None:
        self._name, self._options, self._on_change = name, options, on_change
        self._process: EngineProcess | None = None
        self._max_batch = self._max_rows = 0
        self._drained: asyncio.Event | None = None
        self._progress_at = time.monotonic()
        self.in_flight = InFlight(options.row_timeout)
        self.answers = 0
        """Rows answered, over all processes."""
        self.canary = False
        """Whether to send a single row at a time. Set after an exit without any answer: one row alone shows whether
        the engine or a row is to blame. Cleared by an answer."""
        self.utilization = UtilizationMeter()
        self.idle_since: float | None = None
        """When the engine ran out of rows, on the monotonic clock; None while it has some or is not up."""

    @property
    def batch_size(self) -> int:
        """Rows of a full batch."""
        return 1 if self.canary else min(self._max_batch, self._max_rows)

    def has_capacity(self, pending: int) -> bool:
        """Return whether the engine can take a batch, given the number of rows that are pending."""
        if self._process is None or self._drained is not None or self._process.gone:
            return False
        limit = 1 if self.canary else self._max_rows
        return len(self.in_flight) + min(self.batch_size, pending) <= limit

    def open(self, process: EngineProcess, info: EngineInfo) -> None:
        """Send rows to this process, which is up, from now on."""
        self._process, self._max_batch, self._max_rows = process, info.batch_size, info.rows
        self.idle_since = self._progress_at = time.monotonic()
        self.utilization.on_up(self._progress_at)
        self._on_change(0)

    async def drain(self) -> None:
        """Send no more rows to the process. Return once it has answered those in flight."""
        self._drained = asyncio.Event()
        self._check_drained()
        await self._drained.wait()

    def close(self) -> None:
        """Note that the process has exited. Its rows stay in flight, for the caller to fail."""
        self._process = self._drained = self.idle_since = None
        self.utilization.on_down(time.monotonic())

    def send(self, batch: Sequence[Pending], now: float) -> None:
        """Send a batch. Requires `has_capacity`."""
        if self._process is None:
            raise RuntimeError(f"{self._name} is not up")
        if self.idle_since is not None:
            self.idle_since, self._progress_at = None, now
        self.in_flight.add(batch, now)
        self._process.infer([request for request, _ in batch])

    def on_answers(self, responses: list[Response]) -> None:
        """Handle responses of the process."""
        self.answers += len(responses)
        self.canary = False
        self._progress_at = time.monotonic()
        for response in responses:
            self.in_flight.complete(response, self._progress_at)
        if not self.in_flight:
            self.idle_since = self._progress_at
        self._check_drained()
        self._on_change(len(responses))

    def on_alive(self, message: Alive) -> None:
        """Handle a heartbeat of the process."""
        if message.progress:
            self._progress_at = time.monotonic()
        self.utilization.on_wait(message.wait_seconds, for_rows=self._drained is None)

    async def abandon(self, row: int) -> None:
        """Abort a row that nothing waits for any more. Return once the engine no longer reads its tensors."""
        entry = self.in_flight[row]
        entry.answer = asyncio.get_running_loop().create_future()
        self._abort(row)
        await asyncio.wait([entry.answer])
        entry.answer.exception()  # mark it as retrieved: nothing else reports an exit here

    async def enforce_timeouts(self, process: EngineProcess, log: Path) -> None:
        """Abort overdue rows, and kill the process if it makes no progress. Return once it has exited."""
        hang = self._options.hang_timeout
        while True:
            await asyncio.sleep(min(1.0, hang / 4, self._options.row_timeout / 4))
            if process.gone:
                return
            now = time.monotonic()
            for number, row in self.in_flight.overdue(now):
                if row.timed_out:
                    process.kill("it did not abort a row that had timed out")
                    return
                row.timed_out, row.deadline = True, now + hang
                self._abort(number)
            if self.in_flight and now - self._progress_at > hang:
                process.dump_stacks()
                logger.warning(
                    f"{self._name} hangs: no progress for {hang:g} s (--hang-timeout); its threads' stacks are in {log}"
                )
                await asyncio.sleep(STACKS_SECONDS)
                process.kill(f"it made no progress for {hang:g} s (--hang-timeout)", "was killed because it hung,")
                return

    def _abort(self, row: int) -> None:
        entry = self.in_flight[row]
        if not entry.aborted and self._process is not None:
            entry.aborted = True
            self._process.abort(row)

    def _check_drained(self) -> None:
        if self._drained is not None and not self.in_flight:
            self.idle_since = None  # it is not short of rows
            self._drained.set()
