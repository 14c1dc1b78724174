"""Uploads to an object store while the run continues."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import tenacity

from ..errors import StoppedEarly
from .object_store import RemoteError

logger = logging.getLogger(__name__)

RETRY_SECONDS = 600.0
"""For how long a failed upload is retried before the run stops."""


class Uploads:
    """A queue of uploads, done in order by one thread. Each is retried while the store rejects it or is unreachable.

    Commits to the journal never wait for an upload: what cannot be uploaded stays on the local disk.
    """

    def __init__(self, work: Path, retry_seconds: float) -> None:
        """Start no thread yet.

        Args:
            work: The directory that holds pending files, for messages.
            retry_seconds: For how long a failed upload is retried.
        """
        self._work, self._retry_seconds = work, retry_seconds
        self._changed = threading.Condition()
        self._pending: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._cancelled = threading.Event()

    def submit(self, upload: Callable[[], None]) -> None:
        """Add an upload without waiting for it.

        Args:
            upload: Called again after a RemoteError.

        Raises:
            StoppedEarly: an earlier upload has failed for too long.
            BaseException: any other error of an earlier upload.
        """
        with self._changed:
            if self._failure:
                raise self._failure
            self._pending.append(upload)
            if self._thread is None:
                # A daemon: an unresponsive network must not keep the process from exiting.
                self._thread = threading.Thread(target=self._run, name="batchvl-uploads", daemon=True)
                self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no upload is pending."""
        return self._thread is None

    def wait(self) -> None:
        """Return once all uploads are done. Raises what `submit` raises."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
            if self._failure:
                raise self._failure

    def give_up(self) -> None:
        """Cancel pending uploads and wait for the active one to end."""
        self._cancelled.set()
        with self._changed:
            self._pending.clear()
            self._changed.wait_for(lambda: self._thread is None, timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._failure or not self._pending:
                    self._pending.clear()
                    self._thread = None
                    self._changed.notify_all()
                    return
                upload = self._pending[0]
            try:
                self._retrying()(upload)
            except RemoteError as error:
                self._failure = StoppedEarly(
                    f"{error.filename}: cannot be written: {error.strerror}. All rows reported as done are safe in "
                    f"{self._work}. Check the network and the permissions, then run the same command again on this "
                    f"machine to resume"
                )
                self._failure.__cause__ = error
            except BaseException as error:
                self._failure = error
            else:
                with self._changed:
                    if self._pending:
                        self._pending.popleft()

    def _retrying(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RemoteError),
            stop=tenacity.stop_after_delay(self._retry_seconds) | tenacity.stop_when_event_set(self._cancelled),
            wait=tenacity.wait_random_exponential(1, 30),
            sleep=tenacity.sleep_using_event(self._cancelled),
            before_sleep=self._warn,
            reraise=True,
        )

    def _warn(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and isinstance(error, RemoteError):
            logger.warning(
                "%s: cannot be written: %s. Retrying for %.0f minutes; until then results are kept in %s",
                error.filename,
                error.strerror,
                self._retry_seconds / 60,
                self._work,
            )
