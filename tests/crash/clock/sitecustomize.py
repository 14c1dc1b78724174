"""A wall clock that jumps, in every process with this directory in its PYTHONPATH: Python imports this module at start.

The kernel's clock is shared by all processes, and a time namespace has no wall clock of its own. So Python's functions
for the wall clock are shifted here, in the runner and all processes that it starts, back and forth by hours. Monotonic
clocks are unaffected.
"""

import datetime
import time

_time, _monotonic = time.time, time.monotonic
_HOURS = (5, -7, 3, -24, 48, -1)


def _shift() -> float:
    """Return a shift that changes every 50 ms."""
    return 3600.0 * _HOURS[int(_monotonic() * 20) % len(_HOURS)]


class _DateTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


time.time = lambda: _time() + _shift()
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = _DateTime  # type: ignore[misc]
