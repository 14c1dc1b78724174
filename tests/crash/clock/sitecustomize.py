"""Wall clocks that jump, in a process that has this folder in its PYTHONPATH: Python imports this module at its start.

The kernel's clock is everybody's, and a time namespace has no wall clock of its own. So Python's ways to ask for the
time are shifted here, in the runner and all that it starts, by hours at a time, to and fro. Monotonic clocks go on as
they do in reality.
"""

import datetime
import time

_time, _monotonic = time.time, time.monotonic
_HOURS = (5, -7, 3, -24, 48, -1)


def _shift() -> float:
    """Another one every 50 ms."""
    return 3600.0 * _HOURS[int(_monotonic() * 20) % len(_HOURS)]


class _DateTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(time.time(), tz)


time.time = lambda: _time() + _shift()
time.time_ns = lambda: int(time.time() * 1e9)
datetime.datetime = _DateTime  # type: ignore[misc]
