"""The processes of an engine: the one that was started, its process group, and all of their descendants."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from .watchdog import NAME

KILL_SECONDS = 5.0
_POLL_SECONDS = 0.005
_ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def processes_of(leader: int) -> list[psutil.Process]:
    """Return the live processes of an engine, without its watchdog.

    Descendants that left the process group count, and so do members of the group whose parents have ended.

    Args:
        leader: The process that was started as the leader of a group. It may have ended.
    """
    tree: dict[int, psutil.Process] = {}
    for pid in (leader, *_group(leader)):
        if pid not in tree:
            with suppress(psutil.Error):  # ended meanwhile
                process = psutil.Process(pid)
                tree |= {pid: process} | {child.pid: child for child in process.children(recursive=True)}
    return [process for process in tree.values() if _name(process) != NAME and _is_alive(process.pid)]


def memory_of(leader: int) -> int:
    """Return the bytes of memory that an engine's processes have for themselves: neither the arena nor mapped files."""
    return sum(map(private_memory, processes_of(leader)))


def private_memory(process: psutil.Process) -> int:
    """Return the bytes of a process's anonymous memory; 0 if it has ended."""
    with suppress(psutil.Error):
        memory = process.memory_info()
        return int(memory.rss - memory.shared)
    return 0


def state_of(pid: int) -> str:
    """Return the states of a process's live threads, as ps abbreviates them: "D", "RS"; "" if none is alive."""
    states: set[str] = set()
    with suppress(OSError):
        for thread in (Path("/proc") / str(pid) / "task").iterdir():
            with suppress(OSError):  # ended meanwhile
                # The state follows the name, which is in parentheses and may contain some.
                states.add((thread / "stat").read_text(errors="replace").rpartition(") ")[2][0])
    return "".join(sorted(states - {"Z", "X"}))


def end_group(leader: int, timeout: float = KILL_SECONDS) -> int | None:
    """Kill a process group and wait until all of its processes have ended.

    Args:
        leader: The group's leader, which must not have been reaped: its number could be another process's by now.
        timeout: Seconds to wait.

    Returns:
        A process that is still alive after the timeout, or None.
    """
    deadline = time.monotonic() + timeout
    while True:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        survivor = next(filter(_is_alive, _group(leader)), None)
        if survivor is None or time.monotonic() > deadline:
            return survivor
        time.sleep(_POLL_SECONDS)


def _group(leader: int) -> Iterator[int]:
    """Yield the members of a process group, ended ones that nobody has reaped included."""
    for pid in psutil.pids():
        with suppress(OSError):  # ended meanwhile
            if os.getpgid(pid) == leader:
                yield pid


def _name(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return process.name()
    return ""


def _is_alive(pid: int) -> bool:
    """Return whether a process has a live thread. The first thread alone may have ended, as a zombie."""
    try:
        return psutil.Process(pid).status() not in _ENDED or bool(state_of(pid))
    except psutil.NoSuchProcess:
        return False
