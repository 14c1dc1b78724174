"""A clock that runs while something is so."""

from __future__ import annotations

import time


class Stopwatch:
    """Seconds for which something was so, summed. One thread sets it, any may read it."""

    def __init__(self) -> None:
        self._before = 0.0
        self._since: float | None = None

    def set(self, so: bool) -> None:
        """Whether it is so from now on."""
        now, since = time.monotonic(), self._since
        self._since = (since or now) if so else None
        if since is not None and not so:
            self._before += now - since

    @property
    def seconds(self) -> float:
        since = self._since
        return self._before + (time.monotonic() - since if since is not None else 0.0)
