"""The number of concurrent downloads: raised while that raises the throughput.

A hill climb: as long as the number limits the downloads, it is doubled; if throughput did not rise by a fair part of
that, it goes back, and the next attempt follows after a longer time. It is also doubled when no download ends for a
while: those in progress may be from hosts that do not respond.
"""

from __future__ import annotations

INITIAL = 64
_FACTOR = 2
_FAIR_GAIN = 1.2
"""Ratio of throughputs that justifies a number multiplied by `_FACTOR`."""
_MIN_SECONDS = 1.0
"""Shortest time over which throughput is measured."""
_LATENCIES = 2
"""The same in mean durations of a download: the first downloads of a new level have ended by then."""
_MAX_HOLD_SECONDS = 60.0
_STALL_SECONDS = 1.0
"""Time without an end after which the number is raised at once, doubled each time in a row."""
_COLLAPSE = 0.5
"""Share of the recent highest throughput below which the number is raised without waiting for the next attempt."""
_PEAK_DECAY = 0.9
"""What the highest throughput is multiplied by for each later window."""


class ConcurrencyLevel:
    """How many downloads may be in progress at the same time.

    Args:
        maximum: Limit.
        now: The time.

    Attributes:
        value: The present number.
    """

    def __init__(self, maximum: int, now: float) -> None:
        self.value = min(INITIAL, maximum)
        self._maximum = maximum
        self._since, self._completed, self._seconds = now, 0, 0.0
        self._is_limiting = False
        self._before: tuple[int, float] | None = None
        """The number before it was raised, and its throughput."""
        self._hold_until, self._hold_seconds = 0.0, 2 * _MIN_SECONDS
        self._peak = 0.0
        self._quiet_since, self._stall_seconds, self._usual_seconds = now, _STALL_SECONDS, 0.0

    @property
    def stalls_at(self) -> float | None:
        """Time at which the number is raised if none ends until then and it limits them. None at the maximum."""
        if self.value == self._maximum:
            return None
        return self._quiet_since + max(self._stall_seconds, _LATENCIES * self._usual_seconds)

    def limits(self, now: float) -> None:
        """Record that a download could start now, if the number were larger. Raise it if none has ended for long."""
        self._is_limiting = True
        if self.stalls_at is not None and now >= self.stalls_at:
            self.value = min(self.value * _FACTOR, self._maximum)
            self._stall_seconds *= 2
            self._quiet_since = now
            self._before = None
            self._begin_window(now)

    def is_enough(self, now: float) -> None:
        """Record that something other than the number holds up the downloads, so that this is no stall."""
        self._quiet_since = now

    def complete(self, now: float, seconds: float) -> None:
        """Record the end of a download that took some seconds."""
        self._completed += 1
        self._seconds += seconds
        self._quiet_since, self._stall_seconds = now, _STALL_SECONDS
        window = now - self._since
        if window >= _MIN_SECONDS and window >= _LATENCIES * self._seconds / self._completed:
            self._adjust(now, self._completed / window)

    def _adjust(self, now: float, throughput: float) -> None:
        if self._before is not None:
            number, before = self._before
            self._before = None
            if throughput < _FAIR_GAIN * before:
                self.value = number
                self._hold_seconds = min(2 * self._hold_seconds, _MAX_HOLD_SECONDS)
                self._hold_until = now + self._hold_seconds
            else:
                self._hold_seconds = 2 * _MIN_SECONDS
        may_rise = now >= self._hold_until or throughput < _COLLAPSE * self._peak
        if self._is_limiting and may_rise and self.value < self._maximum:
            self._before = self.value, throughput
            self.value = min(self.value * _FACTOR, self._maximum)
        self._peak = max(throughput, _PEAK_DECAY * self._peak)
        self._usual_seconds = self._seconds / self._completed
        self._begin_window(now)

    def _begin_window(self, now: float) -> None:
        self._since, self._completed, self._seconds = now, 0, 0.0
        self._is_limiting = False
