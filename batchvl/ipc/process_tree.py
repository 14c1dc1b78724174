"""An engine's processes, as /proc tells: the one that was started, its descendants, and who else is in its group."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from .watchdog import NAME

_PROC = Path("/proc")
_KILL_SECONDS = 5.0
_ENDED = ("Z", "X")


class _Process(NamedTuple):
    pid: int
    name: str
    state: str
    parent: int
    group: int

    @property
    def dead(self) -> bool:
        """Whether it has ended, though nobody may have reaped it. Its first thread may have ended alone."""
        return self.state in _ENDED and not state_of(self.pid)


def memory_of(leader: int) -> int:
    """Bytes of memory that an engine's processes have for themselves: not the arena's pages, nor mapped files."""
    return sum(map(_anonymous, _family(leader)))


def state_of(pid: int) -> str:
    """The states, as ps names them, of a process's threads that have not ended: "D", "RS"; "" where there are none."""
    return "".join(sorted({thread.state for thread in _listed(_PROC / str(pid) / "task")} - set(_ENDED)))


def end_group(leader: int) -> int | None:
    """Kills the group of a process that has ended but is not reaped, and waits until nobody in it lives.

    Once the leader is reaped its number may be another's. Returns one that lives on all the same, after some seconds.
    """
    end = time.monotonic() + _KILL_SECONDS
    while True:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(leader, signal.SIGKILL)
        survivor = next((p.pid for p in _listed(_PROC) if p.group == leader and not p.dead), None)
        if survivor is None or time.monotonic() > end:
            return survivor
        time.sleep(0.005)


def _family(leader: int) -> Iterator[int]:
    """Numbers of the processes that live, the guardian's left out."""
    children: dict[int, list[_Process]] = defaultdict(list)
    found: list[_Process] = []
    for process in _listed(_PROC):
        children[process.parent].append(process)
        if process.group == leader or process.pid == leader:
            found.append(process)
    seen: set[int] = set()
    while found:
        process = found.pop()
        if process.pid not in seen:
            seen.add(process.pid)
            found += children[process.pid]
            if process.name != NAME and not process.dead:
                yield process.pid


def _listed(folder: Path) -> Iterator[_Process]:
    """The processes of /proc, or a process's threads of its "task"."""
    pids: list[str] = []
    with suppress(OSError):  # gone meanwhile
        pids = os.listdir(folder)
    for pid in filter(str.isdecimal, pids):
        with suppress(OSError):
            # The name is in brackets, and may have brackets and spaces in it.
            head, _, rest = (folder / pid / "stat").read_bytes().rpartition(b") ")
            name = head.partition(b" (")[2].decode("utf-8", "replace")
            state, parent, group = rest.split(None, 3)[:3]
            yield _Process(int(pid), name, state.decode(), int(parent), int(group))


def _anonymous(pid: int) -> int:
    with suppress(OSError):
        for line in (_PROC / str(pid) / "status").read_bytes().splitlines():
            if line.startswith(b"RssAnon:"):
                return int(line.split()[1]) * 1024
    return 0
