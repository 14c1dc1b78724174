"""One host: how many requests it takes at a time, how fast it may be asked, and whether it answers at all.

A host is an address and a port. All decisions here are made from the times of its requests and their outcomes; nothing
here waits or connects, so the clock is an argument.

- Concurrency starts at 4 and doubles with each round of answers up to the limit (slow start), and is halved when a
  request fails for a reason of the host's.
- The rate is unlimited until the host rejects a request with 429 or 503. Then it is decreased by a factor, at most once
  per round trip, and increased as the window of TCP CUBIC (RFC 9438, section 4.2): slowly just below the rate of the
  last rejection, faster farther from it. Requests are evenly spaced.
- A circuit breaker (Nygard, "Release It!", 2007) opens after several failures in a row. While it is open, only one
  request at a time probes the host, after 1 s and then after twice as long each time, up to 30 s. Any complete
  response closes it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..errors import FetchError

if TYPE_CHECKING:
    from .download import Download

INITIAL_CONCURRENCY = 4
FAILURES = 5
"""Failures in a row that open the breaker of a host that has responded before."""
FIRST_FAILURES = 2
"""The same for a host that has never responded."""
MIN_PROBE_SECONDS, MAX_PROBE_SECONDS = 1.0, 30.0
MAX_PAUSE_SECONDS = 60.0
"""A host that asks for more with Retry-After is probed after this time."""

_DECREASE, _PLATEAU = 0.85, 0.95
"""Ratios of a rate to that of the last rejection: after it, and where the rate is held for long before it rises on."""
_PLATEAU_REQUESTS = 20
"""Requests after a decrease until the plateau is reached; each rejection is at most one of so many."""
_MIN_PLATEAU_SECONDS, _MAX_PLATEAU_SECONDS = 5.0, 60.0
_ESTIMATE_GROWTH = 0.2
"""Relative increase per second until the second rejection."""
_MIN_RATE, _MAX_RATE = 1 / 60, 10_000.0
_MIN_WINDOW_SECONDS = 1.0


class Host:
    """The downloads that wait for a host, and when the next of them may start.

    Args:
        name: Name or address, and port.
        max_concurrency: Limit of concurrent requests.
        max_rate: Limit of requests per second; None is no limit.
    """

    __slots__ = (
        "_concurrency",
        "_cut",
        "_failures",
        "_growing",
        "_is_estimated",
        "_is_probing",
        "_last_start",
        "_max_concurrency",
        "_max_rate",
        "_next_start",
        "_paused_until",
        "_probe_seconds",
        "_rate",
        "_rejected_rate",
        "_rejections",
        "_responses_since_cut",
        "_responses_since_rejection",
        "active",
        "error",
        "is_listed",
        "name",
        "opened",
        "probe_at",
        "queue",
        "responses",
        "wake_at",
    )

    def __init__(self, name: str, max_concurrency: int, max_rate: float | None = None) -> None:
        self.name = name
        self.queue: deque[Download] = deque()
        self.active = 0
        """Requests in progress."""
        self.opened: float | None = None
        """Time at which the breaker opened; None while it is closed."""
        self.probe_at = 0.0
        """Time of the next probe while the breaker is open."""
        self.responses = 0
        """Complete responses so far."""
        self.error: FetchError | None = None
        """The last failure for a reason of the host's."""
        self.is_listed = False
        """Whether the dispatcher has the host on its list of those from which a download may start."""
        self.wake_at: float | None = None
        """Time at which the dispatcher looks at the host again."""
        self._max_concurrency, self._concurrency = max_concurrency, float(min(INITIAL_CONCURRENCY, max_concurrency))
        self._max_rate, self._rate = max_rate, max_rate
        self._next_start = self._paused_until = 0.0
        self._failures = self._rejections = 0
        self._is_probing = self._is_estimated = False
        self._probe_seconds = MIN_PROBE_SECONDS
        self._cut, self._last_start = -1.0, 0.0
        self._rejected_rate = self._growing = 0.0
        self._responses_since_cut = self._responses_since_rejection = 0

    @property
    def is_paced(self) -> bool:
        """Whether the host has asked for fewer requests than it would get, and responds."""
        return self.opened is None and (self._rejections > 0 or self._rate is not None)

    @property
    def is_limited(self) -> bool:
        """Whether the host has a rate because it asked for fewer requests."""
        return self._rate != self._max_rate

    @property
    def is_full(self) -> bool:
        """Whether the host responds, and has as many requests at a time as it may ever have."""
        return self.opened is None and self.active >= self._max_concurrency

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits for the host, and nothing is known about it that a later request should respect."""
        return not self.queue and not self.active and self.opened is None and not self.is_limited

    def ready_at(self, now: float) -> float | None:
        """Return the earliest time for the next request; None if one in progress has to end first."""
        if self.opened is not None:
            return None if self.active else max(now, self.probe_at)
        if self.active >= self._allowed():
            return None
        return max(now, self._next_start, self._paused_until)

    def may_wait(self, now: float, patience: float) -> bool:
        """Return whether a download may still wait for the host.

        Args:
            now: The time.
            patience: Seconds that downloads wait for a host whose breaker is open.
        """
        return self.opened is None or now < self.opened + patience or self.active > 0 or now >= self.probe_at

    def start(self, now: float) -> None:
        """Record the start of a request."""
        self.active += 1
        self._is_probing = self.opened is not None
        if self._rate is not None:
            self._raise_rate(now)
            self._next_start = max(now, self._next_start) + 1 / self._rate
        if self._cut < 0:
            self._cut = now

    def end(self) -> None:
        """Record the end of a request, before its outcome."""
        self.active -= 1

    def respond(self) -> None:
        """Record a complete response, of any status that does not blame the host."""
        self.opened = None
        self._failures = self._rejections = 0
        self._probe_seconds = MIN_PROBE_SECONDS
        self.responses += 1
        self._responses_since_cut += 1
        self._responses_since_rejection += 1
        if self._concurrency < self._max_concurrency:
            self._concurrency = min(self._concurrency + 1, self._max_concurrency)

    def fail(self, now: float) -> None:
        """Record a failure for a reason of the host's, such as a refused connection."""
        self._failures += 1
        self._concurrency = max(1.0, self._concurrency / 2)
        if self.opened is not None:
            if self._is_probing:  # others were in progress when the breaker opened
                self._probe_seconds = min(2 * self._probe_seconds, MAX_PROBE_SECONDS)
                self.probe_at = now + self._probe_seconds
        elif self._failures >= (FAILURES if self.responses else FIRST_FAILURES):
            self._open(now, now + self._probe_seconds)

    def reject(self, now: float, started: float, retry_after: float) -> None:
        """Record a response that asks for fewer requests: 429 or 503.

        Args:
            now: The time.
            started: Start of the request. Requests that were in progress at the last decrease cause no other.
            retry_after: Seconds that the host asks to wait; 0 if it does not say.
        """
        if self.opened is not None:
            if self._is_probing:
                self._probe_seconds = min(max(2 * self._probe_seconds, retry_after), MAX_PAUSE_SECONDS)
                self.probe_at = now + self._probe_seconds
            return
        responses, self._responses_since_rejection = self._responses_since_rejection, 0
        if responses >= _PLATEAU_REQUESTS and not retry_after:
            return  # the first in a while may be about one URL; a host that means it rejects the next one too
        if started >= self._cut:
            self._rejections += 1
            self._decrease(now)
            if self._rejections > FAILURES:
                self._open(now, now + max(self._pause(0), min(retry_after, MAX_PAUSE_SECONDS)))
                return
        if retry_after > MAX_PAUSE_SECONDS:
            self._open(now, now + MAX_PAUSE_SECONDS)
        self._paused_until = max(self._paused_until, now + self._pause(retry_after))

    def probe_now(self) -> None:
        """Let the next request probe the host at once, if the breaker is open."""
        self.probe_at = 0.0

    def _allowed(self) -> int:
        return int(self._concurrency)

    def _open(self, now: float, probe_at: float) -> None:
        self.opened, self.probe_at = now, probe_at

    def _pause(self, retry_after: float) -> float:
        """Return the seconds for which the host gets no requests after a rejection."""
        if retry_after:
            return min(retry_after, MAX_PAUSE_SECONDS)
        return 0.0 if self._rejections <= 1 else min(0.5 * 2.0 ** (self._rejections - 2), MAX_PROBE_SECONDS)

    def _decrease(self, now: float) -> None:
        """Decrease the rate to less than what the host has accepted since the last decrease."""
        seconds, responses = max(now - self._cut, _MIN_WINDOW_SECONDS), self._responses_since_cut
        self._is_estimated = self._rate is None
        if self._rate is None:
            self._rejected_rate = max(responses + self.active, 1) / seconds  # those in progress have been accepted
        elif now - self._cut < _MIN_WINDOW_SECONDS:
            self._rejected_rate = self._rate
        else:  # a rate much higher than what the host got was not what it rejected
            self._rejected_rate = min(self._rate, 2 * responses / seconds) if responses else self._rate / 2
        self._rate = self._limited(_DECREASE * self._rejected_rate)
        self._cut = self._last_start = now
        self._growing = 0.0
        self._next_start = max(self._next_start, now + 1 / self._rate)
        self._responses_since_cut = 0

    def _raise_rate(self, now: float) -> None:
        """Increase the rate with the time since the last decrease, in which the host got requests."""
        if not self._rejected_rate or self._rate is None:
            return
        seconds, self._last_start = min(now - self._last_start, 2 / self._rate), now
        self._growing += seconds
        if self._is_estimated:  # from the first requests, which may have been few
            self._rate = self._limited(self._rate * (1 + _ESTIMATE_GROWTH * seconds))
            return
        plateau = _PLATEAU * self._rejected_rate
        seconds = min(max(_MIN_PLATEAU_SECONDS, _PLATEAU_REQUESTS / plateau), _MAX_PLATEAU_SECONDS)
        self._rate = self._limited(plateau * (1 + (1 - _DECREASE / _PLATEAU) * (self._growing / seconds - 1) ** 3))

    def _limited(self, rate: float) -> float:
        return min(max(_MIN_RATE, rate), _MAX_RATE if self._max_rate is None else self._max_rate)
