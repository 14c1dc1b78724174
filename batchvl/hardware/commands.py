"""Other programs asked for a fact."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence


def run_command(command: Sequence[str], seconds: float) -> tuple[int, str]:
    """The exit code of a program and what it said, both streams, in English.

    Raises FileNotFoundError or another OSError where it cannot be started, TimeoutError where it is still at it after
    `seconds`: it is killed then, and not waited for, since one that hangs in a driver cannot even be killed.
    """
    with tempfile.TemporaryFile() as said:
        environment = {**os.environ, "LC_ALL": "C"}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, env=environment, process_group=0
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command[0]} did not answer within {seconds:g} s") from None
        finally:
            kill_group(process)
        said.seek(0)
        return code, said.read().decode("utf-8", "replace")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that leads a group, and the group, if it has not ended, and gives it a moment to go."""
    if process.poll() is not None:
        return
    try:
        os.killpg(process.pid, 9)
        process.wait(1)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
