"""A small process that ends an engine's process group with the engine, and the engine with the runner.

Engines have children of their own (tensor parallelism, workers), which nothing else ties to the runner, and an engine
that is stuck in C with Python's lock held ends nobody. Started by the engine's process, the leader of the group, as
`python -m batchvl.ipc.watchdog LIFELINE`; what this module imports, each engine pays for.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

NAME = "batchvl-guard"
"""What the kernel calls the process: at most 15 letters."""
_LOOK_MS = 1000


def start_watchdog(lifeline: int) -> subprocess.Popen[bytes]:
    """Starts the guardian of this process's group. `lifeline` is the pipe that ends with the runner."""
    # All other descriptors stay here: the runner waits for the end of its socket. Signals ignored here are there, too.
    return subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "batchvl.ipc.watchdog", str(lifeline), str(os.getpid())],
        pass_fds=(lifeline,), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> None:
    lifeline, leader = int(sys.argv[1]), int(sys.argv[2])
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    # A pipe that only the leader holds would not do: its forks would hold it as well.
    with suppress(OSError, AttributeError):  # a kernel or a Python without: seen within a second all the same
        poll.register(os.pidfd_open(leader), select.POLLIN)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    while os.getppid() == leader and not poll.poll(_LOOK_MS):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)  # and this process, being in it


if __name__ == "__main__":
    main()
