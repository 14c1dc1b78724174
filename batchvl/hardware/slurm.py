"""What Slurm tells a job about its end."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from .commands import run_command

ASK_SECONDS = 5.0


def kill_wait(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds from the SIGTERM that ends a job to the SIGKILL behind it; None outside of one, or if nobody can tell."""
    if "SLURM_JOB_ID" not in environment:
        return None
    try:
        said = run_command(["scontrol", "show", "config"], ASK_SECONDS)[1]
    except OSError:  # no such program, or no answer in time
        return None
    found = re.search(r"^KillWait\s*=\s*(\d+) sec$", said, re.MULTILINE)
    return float(found[1]) if found else None
