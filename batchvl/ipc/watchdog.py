"""A small process that kills an engine's process group when the engine or the runner ends.

Engines start processes of their own (tensor parallelism, workers) that nothing else ties to the runner, and an engine
that is stuck in native code with Python's lock held cannot end them. The engine's process, the leader of the group,
starts the watchdog as `python -m batchvl.ipc.watchdog PARENT_PIPE ENGINE_PID`. It imports little: every engine pays
for its memory.
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
"""The name that the kernel shows for the process: at most 15 characters."""
_POLL_MS = 1000


def start_watchdog(parent_pipe: int) -> subprocess.Popen[bytes]:
    """Start the watchdog of this process's group.

    Args:
        parent_pipe: The read end of the runner's `ParentPipe`.
    """
    # It inherits no other descriptor: the runner waits for the end of file on its socket to this process. Signals that
    # are ignored here are ignored there as well.
    return subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "batchvl.ipc.watchdog", str(parent_pipe), str(os.getpid())],
        pass_fds=(parent_pipe,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def main() -> None:
    """Wait for the end of the engine or the runner, then kill the process group, this process included."""
    parent_pipe, engine = int(sys.argv[1]), int(sys.argv[2])
    poll = select.poll()
    poll.register(parent_pipe, select.POLLIN)
    # A pipe that only the engine holds would not do: processes forked by the engine would hold it, too.
    with suppress(OSError, AttributeError):  # without pidfd_open, the engine's end is noticed within a second
        poll.register(os.pidfd_open(engine), select.POLLIN)
    with suppress(OSError):
        Path("/proc/self/comm").write_text(NAME)
    while os.getppid() == engine and not poll.poll(_POLL_MS):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    main()
