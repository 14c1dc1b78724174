"""Run other programs, with a time limit that holds even if they hang in a driver."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence

_KILL_WAIT_SECONDS = 1.0


def run_command(command: Sequence[str], timeout: float) -> tuple[int, str]:
    """Run a program and return its exit code and its output, in English.

    Args:
        command: The program and its arguments.
        timeout: Seconds after which the program is killed. It is not waited for: a process that hangs in a driver
            cannot even be killed.

    Returns:
        The exit code, and standard output and standard error together.

    Raises:
        FileNotFoundError, OSError: The program cannot be started.
        TimeoutError: The program is still running after `timeout` seconds.
    """
    with tempfile.TemporaryFile() as output:
        environment = {**os.environ, "LC_ALL": "C"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command[0]} did not answer within {timeout:g} s") from None
        finally:
            kill_group(process)
        output.seek(0)
        return code, output.read().decode("utf-8", "replace")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group that a process leads, unless the process has ended, and wait a moment for it to exit."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_KILL_WAIT_SECONDS)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
