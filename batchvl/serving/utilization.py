"""How long an engine was up while there was work, and how much of that it waited for rows."""

from __future__ import annotations


class UtilizationMeter:
    """Of one engine, over all its processes. Times are passed in, on the monotonic clock.

    It counts from the run's first list on: what comes before is the start. A process's own count of its waits comes
    now and then (`waited`), and is worth something once another list is handed over: when no more rows come, as at the
    run's end, it is not rows that are missing.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        """That the engine was up between the first list and the latest answer."""
        self.wait_seconds = 0.0
        """That it was short of rows, between the first list and the latest."""
        self._begun = False
        self._up_before = self._waited = self._told = 0.0
        self._up_since: float | None = None

    def up(self, now: float) -> None:
        """A process is up."""
        self._up_since, self._told = now, 0.0

    def down(self, now: float) -> None:
        """The process is gone."""
        if self._up_since is not None:
            self._up_before += now - self._up_since
            self._up_since = None

    def waited(self, seconds: float, for_rows: bool) -> None:
        """So long the process has waited since its start; `for_rows`: not because it is handed none any more."""
        if self._begun and for_rows:
            self._waited += seconds - self._told
        self._told = seconds

    def listed(self, now: float) -> None:
        """A list was handed over."""
        if not self._begun:
            self._begun, self._up_before = True, 0.0
            self._up_since = self._up_since and now
        self.wait_seconds = self._waited

    def answered(self, now: float) -> None:
        """Rows were answered."""
        self.seconds = self._up_before + (now - self._up_since if self._up_since is not None else 0.0)
