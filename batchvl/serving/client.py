"""What hands an engine's process its rows in lists, and sees to it that they come back."""

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


class EngineClient:
    """Feeds one process at a time: the one that is given to `open`, until `close` or `drain`.

    name: who is fed, for people. `changed` is called when there may be room for rows, with how many were answered.
    """

    def __init__(self, name: str, options: EngineOptions, changed: Callable[[int], None]) -> None:
        self._name, self._options, self._changed = name, options, changed
        self._process: EngineProcess | None = None
        self._info: EngineInfo | None = None
        self._drained: Callable[[], None] | None = None
        self._progress = time.monotonic()
        self.rows = InFlight(options.row_timeout)
        self.singly = False
        """Whether to hand over one row at a time, until one is answered."""
        self.answers = 0
        self.uptime = UtilizationMeter()
        self.idle_since: float | None = None
        """When the engine ran out of rows, on the monotonic clock; None while it has some."""

    @property
    def is_open(self) -> bool:
        """Whether there is a process that is up and not to be replaced."""
        return self._process is not None and self._drained is None

    @property
    def tries_one(self) -> bool:
        """Whether it is open which is to blame for a death, the engine or a row: one row, on its own, tells."""
        return self.singly and not self.answers

    @property
    def list_size(self) -> int:
        """Rows of a full list."""
        assert self._info is not None
        return 1 if self.tries_one else min(self._info.batch_size, self._info.rows)

    def has_room(self, waiting: int) -> bool:
        """Whether the process may be handed a list of so many rows that wait."""
        if self._process is None or self._info is None or self._drained is not None or self._process.gone:
            return False
        most = 1 if self.tries_one else self._info.rows
        return len(self.rows.held) + min(self.list_size, waiting) <= most

    def open(self, process: EngineProcess, info: EngineInfo) -> None:
        """The process is up: it gets rows from now on."""
        self._process, self._info = process, info
        self.idle_since = self._progress = time.monotonic()
        self.uptime.up(self._progress)
        self._changed(0)

    def drain(self, then: Callable[[], None]) -> None:
        """The process gets no more rows; `then` is called once it has answered those that it holds."""
        self._drained = then
        self._leave_drained()

    def close(self) -> None:
        """The process is gone."""
        self._process = self._drained = self.idle_since = None
        self.uptime.down(time.monotonic())

    def send(self, rows: Sequence[Pending], now: float) -> None:
        """Hands over a list."""
        assert self._process is not None
        if self.idle_since is not None:
            self.idle_since, self._progress = None, now
        self.rows.hold(rows, now)
        self._process.infer([request for request, _ in rows])

    def answered(self, responses: list[Response]) -> None:
        """Rows are back."""
        self.answers += len(responses)
        self._progress = time.monotonic()
        for response in responses:
            self.rows.answered(response, self._progress)
        if not self.rows.held:
            self.idle_since = self._progress
        self._leave_drained()
        self._changed(len(responses))

    def alive(self, told: Alive) -> None:
        """The engine makes progress, or has waited for rows."""
        if told.progress:
            self._progress = time.monotonic()
        self.uptime.waited(told.wait_seconds, for_rows=self._drained is None)

    async def let_go(self, row: int) -> None:
        """Has the engine end a row that it holds and nobody waits for, and returns when it has."""
        held = self.rows.held[row]
        held.answer = asyncio.get_running_loop().create_future()
        self._abort(row)
        await asyncio.wait([held.answer])
        held.answer.exception()  # a death then is nobody's news

    async def watch(self, log: Path) -> None:
        """Aborts rows past their deadline and ends a process that makes no progress, for as long as it is awaited."""
        hang = self._options.hang_timeout
        while True:
            await asyncio.sleep(min(1.0, hang / 4, self._options.row_timeout / 4))
            now = time.monotonic()
            for number, row in self.rows.overdue(now):
                if self._process is None or self._process.gone:
                    break
                if row.timed_out:
                    self._process.kill("it did not let go of a row that it was told to abort")
                    break
                row.timed_out, row.deadline = True, now + hang
                self._abort(number)
            hung = self._process
            if self.rows.held and now - self._progress > hang and hung is not None and not hung.gone:
                self._progress = now
                hung.dump_stacks()
                logger.warning(
                    f"{self._name} hangs: no progress for {hang:g} s (--hang-timeout); where it stands is in {log}"
                )
                await asyncio.sleep(0.5)  # in which another may take its place
                hung.kill(f"it made no progress for {hang:g} s (--hang-timeout)", "was ended, having hung,")

    def _abort(self, row: int) -> None:
        held = self.rows.held[row]
        if not held.aborted and self._process is not None:
            held.aborted = True
            self._process.abort(row)

    def _leave_drained(self) -> None:
        if self._drained is not None and not self.rows.held:
            self.idle_since = None  # it is not rows that are missing
            self._drained()
