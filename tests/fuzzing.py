"""How many examples Hypothesis tries per property: a few in `make test`, many in `make fuzz`."""

from __future__ import annotations

import os

FACTOR = int(os.environ.get("FUZZ", "1"))
"""Examples for each one of `make test`."""


def examples(count: int) -> int:
    """Return `count`, or as many times that as `make fuzz` asks for.

    >>> examples(60) // FACTOR
    60
    """
    return count * FACTOR
