"""Signals that end a run: the first in order, the same again, seconds later, at once."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
FORCE_EXIT_AFTER = 2.0


@contextmanager
def handle_signals(stop: Callable[[str], None], leave: Callable[[str], None]) -> Iterator[None]:
    """Inside, `stop` is called with the name of each signal of STOPPING, on the running loop; `leave` where the same
    signal comes again AGAIN_SECONDS later or more.

    A signal that is ignored stays so (`nohup` ignores SIGHUP, a shell's `&` SIGINT), and handlers that others set are
    back afterwards. Only the main thread can hear signals: in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # a notebook's loop has the main thread, and the signals
        return
    loop, first = asyncio.get_running_loop(), dict[int, float]()

    def received(number: signal.Signals) -> None:
        now = time.monotonic()
        again = now - first.setdefault(number, now) >= FORCE_EXIT_AFTER
        (leave if again else stop)(number.name)

    before = {number: signal.getsignal(number) for number in STOPPING}
    listening = [number for number in STOPPING if before[number] is not signal.SIG_IGN]
    for number in listening:
        loop.add_signal_handler(number, received, number)
    try:
        yield
    finally:
        for number in listening:
            loop.remove_signal_handler(number)
            if before[number] is not None:
                signal.signal(number, before[number])
