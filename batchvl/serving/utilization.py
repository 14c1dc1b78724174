"""The time for which an engine was up while there was work, and how much of it the engine waited for rows."""

from __future__ import annotations


class UtilizationMeter:
    """The utilization of one engine, over all its processes. Callers pass the current time, on the monotonic clock.

    Time counts from the run's first batch; what comes before is start-up. A process reports its own wait time now and
    then (`on_wait`), which counts only once another batch follows: at the end of a run, when no more rows come, the
    engine is not waiting for rows.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds for which the engine was up, from the first batch to the latest answer."""
        self.wait_seconds = 0.0
        """Seconds in which it was short of rows, from the first batch to the latest."""
        self._begun = False
        self._up_before = self._waited = self._reported = 0.0
        self._up_since: float | None = None

    def on_up(self, now: float) -> None:
        """Note that a process is up."""
        self._up_since, self._reported = now, 0.0

    def on_down(self, now: float) -> None:
        """Note that the process has exited."""
        if self._up_since is not None:
            self._up_before += now - self._up_since
            self._up_since = None

    def on_wait(self, seconds: float, for_rows: bool) -> None:
        """Note the process's wait time.

        Args:
            seconds: Total wait since the process started.
            for_rows: False if the process is draining, so that its waits do not count.
        """
        if self._begun and for_rows:
            self._waited += seconds - self._reported
        self._reported = seconds

    def on_batch(self, now: float) -> None:
        """Note that an engine of the run received a batch."""
        if not self._begun:
            self._begun, self._up_before = True, 0.0
            self._up_since = self._up_since and now
        self.wait_seconds = self._waited

    def on_answers(self, now: float) -> None:
        """Note that an engine of the run answered rows."""
        self.seconds = self._up_before + (now - self._up_since if self._up_since is not None else 0.0)
