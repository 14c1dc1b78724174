"""Signals, time limits and interrupts that stop a run: the first one in order, the same signal again immediately."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..errors import BatchvlError, StoppedEarly
from ..hardware.slurm import kill_wait

logger = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
FORCE_EXIT_AFTER = 2.0
"""Seconds after which the same signal again forces the exit. Before that it is taken for a duplicate."""
WRITING_SECONDS = 5.0
"""Seconds of the time that Slurm leaves before it kills which are reserved for writing results."""


@contextmanager
def handle_signals(stop: Callable[[str], None], force_exit: Callable[[str], None]) -> Iterator[None]:
    """Handle the signals of STOPPING inside the `with`, on the running event loop.

    An ignored signal stays ignored (`nohup` ignores SIGHUP, a shell's `&` SIGINT), and the previous handlers are
    restored afterwards. In other threads than the main thread, which cannot handle signals, nothing changes.

    Args:
        stop: Called with the name of each signal.
        force_exit: Called instead, if the same signal was received FORCE_EXIT_AFTER seconds ago or earlier.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    received: dict[int, float] = {}

    def handle(number: signal.Signals) -> None:
        now = time.monotonic()
        repeated = now - received.setdefault(number, now) >= FORCE_EXIT_AFTER
        (force_exit if repeated else stop)(number.name)

    previous = {number: signal.getsignal(number) for number in STOPPING}
    handled = [number for number in STOPPING if previous[number] is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
            if previous[number] is not None:
                signal.signal(number, previous[number])


class Stopper:
    """Stops a run in order, wherever it is. The first request counts; later ones can only shorten the grace.

    Args:
        grace: Seconds that rows inside the engine get to finish.
    """

    def __init__(self, grace: float) -> None:
        self.reason: StoppedEarly | None = None
        """Why the run stops, once that is so."""
        self._grace, self._interrupt_grace = grace, grace
        self._kill_wait: float | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_stage: Callable[[BatchvlError, float], str] = _nothing_to_stop

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Stop the run on signals, inside the `with`, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        query = self._loop.create_task(self._query_kill_wait())
        try:
            with handle_signals(self.stop, self._force_exit):
                yield
        finally:
            query.cancel()

    @contextmanager
    def stage(self, stop: Callable[[BatchvlError, float], str]) -> Iterator[None]:
        """Use `stop` inside the `with` to stop the run.

        Args:
            stop: Called with the reason and the grace in seconds. Returns what happens now, for the log.
        """
        previous, self._stop_stage = self._stop_stage, stop
        try:
            yield
        finally:
            self._stop_stage = previous

    @contextmanager
    def cancel_task(self) -> Iterator[None]:
        """Cancel the current task, once, if the run is stopped inside the `with`."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("no task to cancel")

        def cancel(reason: BatchvlError, grace: float) -> str:
            self._stop_stage = _nothing_to_stop
            task.cancel()
            return "stopping before the first row"

        with self.stage(cancel):
            yield

    def stop_after(self, seconds: float, name: str) -> None:
        """Stop the run after a time."""
        asyncio.get_running_loop().call_later(seconds, self.stop, name)

    def stop(self, name: str, grace: float | None = None) -> None:
        """Stop the run.

        Args:
            name: What stops it: a signal, an option, ….
            grace: Seconds that rows inside the engine get; by default those of the options, and for SIGTERM no more
                than Slurm leaves.
        """
        grace = self._grace if grace is None else grace
        if name == "SIGTERM" and self._kill_wait is not None:
            grace = min(grace, max(0.0, self._kill_wait - WRITING_SECONDS))
        first = self.reason is None
        self.reason = self.reason or StoppedEarly(f"stopped by {name}: run the same command again to resume")
        outcome = self._stop_stage(self.reason, grace)
        if first:
            logger.info(f"{name}: {outcome}")

    def interrupt(self) -> None:
        """Stop the run from another thread: the first time in order, then without grace."""
        grace, self._interrupt_grace = self._interrupt_grace, 0.0
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop, "an interrupt", grace)

    def _force_exit(self, name: str) -> None:
        """Exit now. What was committed is safe, and the child processes end with this one."""
        logger.info(f"{name} again: exiting immediately; run the same command again to resume")
        os._exit(StoppedEarly.exit_code)

    async def _query_kill_wait(self) -> None:
        self._kill_wait = await asyncio.to_thread(kill_wait)


def _nothing_to_stop(reason: BatchvlError, grace: float) -> str:
    return "all rows are done; writing the results"
