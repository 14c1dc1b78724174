"""What is on its way to an object store, while the run goes on."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import tenacity

from ..errors import StoppedEarly
from .object_store import RemoteError

log = logging.getLogger(__name__)

PATIENCE = 600.0
"""For how many seconds what fails is tried again before the run stops."""


class Uploads:
    """Uploads in order, in a thread of its own, each tried again while the store cannot be reached or refuses.

    Commits to the journal wait for none of them: what cannot be uploaded stays on the local disk.
    """

    def __init__(self, work: Path, patience: float) -> None:
        """work: where what was not uploaded lies meanwhile, for people."""
        self._work, self._patience = work, patience
        self._changed = threading.Condition()
        self._waiting: deque[Callable[[], None]] = deque()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._given_up = threading.Event()

    def submit(self, upload: Callable[[], None]) -> None:
        """Takes an upload; does not wait. It may be done again after a failure. Raises what an earlier one failed with.

        That is StoppedEarly where the store did not take it for so long, and whatever else `upload` raises.
        """
        with self._changed:
            if self._failure:
                raise self._failure
            self._waiting.append(upload)
            if self._thread is None:
                # A daemon: a network that hangs must not keep a process that was told to leave.
                self._thread = threading.Thread(target=self._run, name="batchvl-uploads", daemon=True)
                self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""
        return self._thread is None

    def wait(self) -> None:
        """Returns once all is uploaded. Raises what one failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._thread is None)
            if self._failure:
                raise self._failure

    def give_up(self) -> None:
        """Leaves what is not uploaded where it is; returns when the one that is under way has ended."""
        self._given_up.set()
        with self._changed:
            self._waiting.clear()
            self._changed.wait_for(lambda: self._thread is None, timeout=10)

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._failure or not self._waiting:
                    self._waiting.clear()
                    self._thread = None
                    self._changed.notify_all()
                    return
                upload = self._waiting[0]
            try:
                self._attempts()(upload)
            except RemoteError as error:
                self._failure = StoppedEarly(
                    f"{error.filename}: cannot be written: {error.strerror}. All that was reported as done is kept in "
                    f"{self._work}: see to the network and the permissions, and run the same command again on this "
                    f"machine to go on"
                )
                self._failure.__cause__ = error
            except BaseException as error:
                self._failure = error
            else:
                with self._changed:
                    if self._waiting:
                        self._waiting.popleft()

    def _attempts(self) -> tenacity.Retrying:
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(RemoteError),
            stop=tenacity.stop_after_delay(self._patience) | tenacity.stop_when_event_set(self._given_up),
            wait=tenacity.wait_random_exponential(1, 30), sleep=tenacity.sleep_using_event(self._given_up),
            before_sleep=self._warn, reraise=True,
        )  # fmt: skip

    def _warn(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number == 1 and isinstance(error, RemoteError):
            log.warning(
                "%s: cannot be written: %s. Trying again for %.0f minutes; until then answers are kept in %s",
                error.filename, error.strerror, self._patience / 60, self._work,
            )  # fmt: skip
