"""How slow this machine is right now, and time limits that allow for it.

The factor is measured once, when the test session starts (`tests/conftest.py`). A limit that guards against a hang is
written for a quiet machine and passed through `scaled`; a limit that is itself what a test measures is not.
"""

from __future__ import annotations

import hashlib
import os
import time

# CPU seconds that `_work` takes on a quiet core of the machine for which the limits were written.
_REFERENCE_CPU_SECONDS = 0.012
_SAMPLES = 16
_MAX_SECONDS = 5.0
_LARGEST = 20.0  # a limit must still end a test that hangs

_factor = 1.0


def factor() -> float:
    """Return how many times longer than on a quiet machine things take here, at least 1."""
    return _factor


def set_factor(value: float) -> None:
    """Set the factor for this process; called once, before the first test."""
    global _factor
    _factor = value


def scaled(seconds: float) -> float:
    """Return a limit of `seconds`, stretched for this machine."""
    return seconds * _factor


def measure() -> float:
    """Measure the factor: a fixed piece of work on the CPU, and the load average per core.

    Wall time over the reference covers both a slow core and a core that is shared with other processes. The load
    average covers what a sample of a fraction of a second misses. The larger one wins.
    """
    started, done = time.perf_counter(), 0
    while done < _SAMPLES and time.perf_counter() - started < _MAX_SECONDS:
        _work()
        done += 1
    sampled = (time.perf_counter() - started) / done / _REFERENCE_CPU_SECONDS
    return combine(sampled, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def combine(sampled: float, load_per_core: float) -> float:
    """Return the larger of both, between 1 and 20.

    >>> combine(0.9, 0.2), combine(2.5, 1.5), combine(1.0, 100.0)
    (1.0, 2.5, 20.0)
    """
    return min(max(1.0, sampled, load_per_core), _LARGEST)


def _work() -> None:
    # Half interpreter, half C: the mix of the tests.
    digest = hashlib.blake2b()
    block = bytes(65536)
    for number in range(100):
        digest.update(block)
        sum(i * number for i in range(1000))
