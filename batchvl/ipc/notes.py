"""Log records of a child process, which the runner logs as its own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from ..types import Struct


class Note(Struct, frozen=True, tag="note"):
    """A log record for the user."""

    text: str
    level: int


class NoteHandler(logging.Handler):
    """Forward log records to the runner as `Note` messages. Any thread may log.

    Args:
        send: Sends a message; called on the event loop in which the handler was created.
    """

    def __init__(self, send: Callable[[Note], None]) -> None:
        super().__init__(logging.INFO)
        self._send, self._loop = send, asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            note = Note(self.format(record), record.levelno)
        except Exception:
            self.handleError(record)
            return
        with suppress(RuntimeError):  # the loop is closed: the process is about to exit
            self._loop.call_soon_threadsafe(self._send, note)


def forward_notes(send: Callable[[Note], None]) -> None:
    """Forward what this process logs about batchvl, from now on. For the running event loop."""
    logger = logging.getLogger("batchvl")
    logger.addHandler(NoteHandler(send))
    logger.setLevel(logging.INFO)
