"""Child processes that never outlive the runner.

A child is started as `python -m batchvl.…` and never imports the user's main module, so that a run works from a
notebook. It dies with its parent in two ways: the kernel kills it (PR_SET_PDEATHSIG), and a pipe whose other end the
runner holds is closed, which covers a parent that died between fork and prctl. Processes that an engine starts itself
are killed by its watchdog (`ipc/watchdog.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_SOURCE_ROOT = str(Path(__file__).resolve().parents[2])

_INHERITED = {
    "CONDA_PREFIX",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_MODULES_CACHE",
    "HOME",
    "LANG",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "PATH",
    "TMPDIR",
    "TRANSFORMERS_OFFLINE",
    "TZ",
    "USER",
    "VIRTUAL_ENV",
}
_INHERITED_PREFIXES = ("LC_", "PYTHON", "MALLOC_", "COVERAGE_")
# malloc keeps the memory of one image for the next: without the page faults, decoding is 15 to 20 % faster.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_ISOLATED = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class ParentPipe:
    """A pipe that the children read and the runner never writes to: its end of file means that the runner has ended.

    Attributes:
        fd: The read end, for the children's `pass_fds`.
    """

    def __init__(self) -> None:
        self.fd, self._write_end = os.pipe2(os.O_CLOEXEC)

    def close(self) -> None:
        """Close the runner's end, which makes every child that still watches the pipe exit."""
        os.close(self._write_end)
        os.close(self.fd)


def spawn(
    module: str, arguments: Sequence[str], fds: Sequence[int], environment: Mapping[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start `python -m module` in a process group of its own.

    Args:
        module: The module to run.
        arguments: Its command-line arguments.
        fds: File descriptors that the child inherits, under the same numbers.
        environment: Environment variables.
        log: File for standard output and standard error.
    """
    path = os.pathsep.join(filter(None, (_SOURCE_ROOT, environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        pass_fds=tuple(fds),
        env={**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # only the runner handles a terminal's Ctrl-C
    )


def spawn_with_socket(
    module: str, parent_pipe: ParentPipe, fds: Sequence[int], environment: Mapping[str, str], log: IO[bytes]
) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start `python -m module SOCKET PARENT_PIPE PARENT`: two file descriptors and the runner's process ID.

    Args:
        module: The module to run. It calls `watch_parent`.
        parent_pipe: The runner's.
        fds: Further file descriptors that the child inherits.
        environment: Environment variables.
        log: File for standard output and standard error.

    Returns:
        The process, and the runner's end of the socket.

    Raises:
        OSError: The process cannot be started.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        inherited = [theirs.fileno(), parent_pipe.fd]
        try:
            process = spawn(module, [*map(str, inherited), str(os.getpid())], [*inherited, *fds], environment, log)
        except BaseException:
            ours.close()
            raise
    return process, ours


def exit_reason(code: int | None) -> str:
    """Return how a process ended, in a few words.

    Args:
        code: As of `subprocess.Popen.returncode`.

    >>> exit_reason(-9), exit_reason(1)
    ('SIGKILL', 'exit code 1')
    """
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when its parent ends, and ignore the signals that the runner handles.

    Slurm and terminals signal every process of a job, but rows in the engine have a grace period.

    Args:
        parent: The parent's process ID. If it is no longer the parent, this process exits immediately.
    """
    for number in _IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the call of prctl


def watch_parent(fd: int, parent: int) -> None:
    """Call `die_with_parent`, and start a thread that exits this process when the runner closes its `ParentPipe`.

    Args:
        fd: The read end of the pipe.
        parent: The parent's process ID.
    """
    die_with_parent(parent)

    def watch() -> None:
        while os.read(fd, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def sanitized_env(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of image workers, which parse untrusted data: no secrets, no GPU, one thread.

    >>> sorted(sanitized_env({"HF_TOKEN": "s", "PATH": "/bin"}))[:2]
    ['CUDA_VISIBLE_DEVICES', 'HF_HUB_OFFLINE']
    """
    inherited = {
        name: value for name, value in environment.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return {**_MALLOC, **inherited, **_ONE_THREAD, **_ISOLATED}
