"""What hands an engine's process its rows in lists, and sees to it that they come back."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from ..options import EngineOptions
from ..request import Response
from .messages import Alive
from .process import EngineProcess
from .protocol import EngineInfo
from .rows import Rows
from .uptime import Uptime

LINGER_SECONDS = 0.005
"""How long an incomplete list waits for more rows while the engine has room."""


class Feed:
    """Feeds one process at a time: the one that is given to `open`, until `close` or `drain`."""

    def __init__(self, rows: Rows, options: EngineOptions) -> None:
        self._rows, self._options = rows, options
        self._process: EngineProcess | None = None
        self._info: EngineInfo | None = None
        self._drained: Callable[[], None] | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._progress = time.monotonic()
        self.singly = False
        """Whether to hand over one row at a time, until one is answered."""
        self.answers = 0
        self.uptime = Uptime()
        self.idle_since: float | None = None
        """When the engine ran out of rows, on the monotonic clock; None while it has some."""

    @property
    def is_open(self) -> bool:
        """Whether there is a process that is up and not to be replaced."""
        return self._process is not None and self._drained is None

    def open(self, process: EngineProcess, info: EngineInfo) -> None:
        """The process is up: it gets rows from now on."""
        self._process, self._info = process, info
        self.idle_since = self._progress = time.monotonic()
        self.uptime.up(self._progress)
        self.pump()

    def drain(self, then: Callable[[], None]) -> None:
        """The process gets no more rows; `then` is called once it has answered those that it holds."""
        self._drained = then
        self.pump()

    def close(self) -> None:
        """The process is gone."""
        self._process = self._drained = self.idle_since = None
        self.uptime.down(time.monotonic())

    def pump(self, lingered: bool = False) -> None:
        """Hands over lists while the engine has room for them; an incomplete one only after a moment's wait for more.

        What counts is rows, not lists: of a list whose rows are answered but one, only that one takes up room.
        """
        if self._process is None or self._info is None or self._process.gone:
            return
        rows, most = self._rows, self._info.rows
        size = min(self._info.batch_size, most)
        if self._drained is not None:
            if not rows.held:
                self.idle_since = None  # it is not rows that are missing
                self._drained()
            return
        if self.singly and not self.answers:
            size = most = 1  # was it the engine or a row? One row, from their middle, tells
            rows.waiting.rotate(len(rows.waiting) // 2)
        while rows.waiting and len(rows.held) + min(size, len(rows.waiting)) <= most:
            if len(rows.waiting) < size and not lingered:
                if self._lingering is None:
                    self._lingering = asyncio.get_running_loop().call_later(LINGER_SECONDS, self._pump_lingered)
                return
            self._send(self._process, size)

    def answered(self, responses: list[Response]) -> None:
        """Rows are back."""
        self.answers += len(responses)
        self._progress = time.monotonic()
        self.uptime.answered(self._progress)
        for response in responses:
            self._rows.answered(response, self._progress)
        if not self._rows.held:
            self.idle_since = self._progress
        self.pump()

    def alive(self, told: Alive) -> None:
        """The engine makes progress, or has waited for rows."""
        if told.progress:
            self._progress = time.monotonic()
        self.uptime.waited(told.wait_seconds, for_rows=self._drained is None)

    def abort(self, row: int) -> None:
        """Has the engine end a row that it holds; it comes back all the same."""
        held = self._rows.held.get(row)
        if held is not None and not held.aborted and self._process is not None:
            held.aborted = True
            self._process.abort(row)

    async def watch(self, say: Callable[[str], None], log: Path) -> None:
        """Aborts rows past their deadline and ends a process that makes no progress, for as long as it is awaited."""
        hang = self._options.hang_timeout
        while True:
            await asyncio.sleep(min(1.0, hang / 4, self._options.row_timeout / 4))
            now = time.monotonic()
            for number, row in self._rows.overdue(now):
                if self._process is None or self._process.gone:
                    break
                if row.timed_out:
                    self._process.kill("it did not let go of a row that it was told to abort")
                    break
                row.timed_out, row.deadline = True, now + hang
                self.abort(number)
            hung = self._process
            if self._rows.held and now - self._progress > hang and hung is not None and not hung.gone:
                self._progress = now
                hung.dump_stacks()
                say(f"the engine hangs: no progress for {hang:g} s (--hang-timeout); where it stands is in {log}")
                await asyncio.sleep(0.5)  # in which another may take its place
                hung.kill(f"it made no progress for {hang:g} s (--hang-timeout)", "was ended, having hung,")

    def _pump_lingered(self) -> None:
        self._lingering = None
        self.pump(lingered=True)

    def _send(self, process: EngineProcess, size: int) -> None:
        now = time.monotonic()
        requests = self._rows.next_list(size, now)
        if not requests:
            return
        if self.idle_since is not None:
            self.idle_since, self._progress = None, now
        self.uptime.listed(now)
        process.infer(requests)
