"""Child processes that never outlive the runner.

A child is started as `python -m batchvl.…`, never by importing the user's main module again, so a run works from a
notebook. It dies with its parent two ways: the kernel kills it (PR_SET_PDEATHSIG), and a pipe whose other end the
runner holds reaches its end, which also covers a parent that went between fork and prctl. What an engine starts by
itself, its guardian ends (`engines/guardian.py`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])


class ParentPipe:
    """The runner's end of the pipe; children hold the other. `fd` is for their `pass_fds`."""

    def __init__(self) -> None:
        self.fd, self._held = os.pipe2(os.O_CLOEXEC)

    def close(self) -> None:
        """Tells every child that still holds the other end to leave."""
        os.close(self._held)
        os.close(self.fd)


def spawn(
    module: str, arguments: Sequence[str], fds: Sequence[int], environment: Mapping[str, str], log: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Starts `python -m module` with the descriptors inherited under their own numbers; output goes to `log`."""
    path = os.pathsep.join(filter(None, (_PACKAGE_PARENT, environment.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        pass_fds=tuple(fds),
        env={**environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        process_group=0,  # a terminal's Ctrl-C is the runner's to handle, not its children's
    )


def die_with_parent(parent: int) -> None:
    """In a child: die with the parent, whose process id is `parent`, and leave signals to the runner.

    Slurm and terminals signal every process of a job, and what is in the engine has a grace period.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # it was gone before the kernel knew whom to watch


def watch_parent(fd: int, parent: int) -> None:
    """In a child: `die_with_parent`, and leave when the pipe `fd` ends as well. Starts a thread."""
    die_with_parent(parent)

    def watch() -> None:
        while os.read(fd, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


_KEPT = {
    "PATH", "HOME", "USER", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "CONDA_PREFIX", "LD_LIBRARY_PATH", "LD_PRELOAD",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE",
}  # fmt: skip
# Memory of one picture is kept for the next: decoding is 15 to 20 % faster without the page faults.
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26)}
_KEPT_PREFIXES = ("LC_", "PYTHON", "MALLOC_")


def sanitized_env(environment: Mapping[str, str]) -> dict[str, str]:
    """What image workers, which read strangers' bytes, may see of the environment: no tokens, no GPU, one thread.

    >>> sorted(sanitized_env({"HF_TOKEN": "s", "PATH": "/bin"}))[:2]
    ['CUDA_VISIBLE_DEVICES', 'HF_HUB_OFFLINE']
    """
    kept = {k: v for k, v in environment.items() if k in _KEPT or k.startswith(_KEPT_PREFIXES)}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    apart = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    return {**_MALLOC, **kept, **threads, **apart}
