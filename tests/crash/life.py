"""A run with all processes that it starts: which they are, the memory that they hold, and their end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..runner.running import PATIENCE, environment

KINDS = ("runner", "engine", "worker", "forkserver", "watchdog", "all")
"""Targets of kills: the runner alone, a process that it started, or all, as when a node runs out of memory or fails."""
ENDING = ("runner", "all")
"""Targets whose death ends the run."""

_MODULES = {
    "forkserver": "batchvl.images.forkserver",
    "engine": "batchvl.serving.engine_main",
    "watchdog": "batchvl.ipc.watchdog",
}
_SHARED = ("/dev/shm/", "/SYSV")
_ROOT = Path(__file__).parents[2]

Memory = tuple[int, int]
"""A memfd, by device and inode."""


class Life:
    """One run of the command, in a new session.

    Every process inherits its session and keeps it when its parent ends, unless it creates another, which batchvl's
    processes do not. So the session identifies all processes of the run.
    """

    def __init__(self, arguments: Sequence[str], log: Path, **settings: Any) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                **{"env": environment(PYTHONPATH=str(_ROOT)), **settings},
            )
        self.started = time.monotonic()

    @property
    def output(self) -> str:
        """The run's output so far."""
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether the runner has ended."""
        return self.process.poll() is not None

    def members(self) -> list[int]:
        """Return the run's living processes, including those whose parent has ended."""
        return [pid for pid in _processes() if _session(pid) == self.process.pid]

    def find(self, kind: str) -> list[int]:
        """Return the present processes of a kind; there may be none."""
        members = self.members()
        if kind == "all":
            return members
        if kind == "runner":
            return [self.process.pid] if self.process.pid in members else []
        matching = [
            pid for pid in members if _MODULES.get(kind, _MODULES["forkserver"]).encode() in _read(pid, "cmdline")
        ]
        if kind == "watchdog" or kind == "engine":
            return matching
        forked = [pid for pid in matching if _parent(pid) in matching]
        return forked if kind == "worker" else [pid for pid in matching if pid not in forked]

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kill one process of a kind, or with "all" every process, with SIGKILL; return whether there was one."""
        pids = self.find(kind)
        draw.shuffle(pids)
        killed = 0
        for pid in pids if kind == "all" else pids[:1]:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        return killed > 0

    def memory(self) -> set[Memory]:
        """Return the shared memory that the run's processes hold now.

        Raises:
            AssertionError: A process maps shared memory that has a name, which would outlive the run.
        """
        memory = set()
        for pid in self.members():
            memory |= set(_memfds(pid))
            named = [line for line in _read(pid, "maps").decode().splitlines() if any(s in line for s in _SHARED)]
            assert not named, f"{_read(pid, 'cmdline')!r} maps shared memory with a name: {named[0]}"
        return memory

    def wait(self) -> int:
        """Wait until the run ends by itself and return its exit code."""
        return self.process.wait(PATIENCE)

    def wait_for_processes(self) -> float:
        """Wait, after the runner has ended, until its last process ends, and return the seconds waited."""
        begin = time.monotonic()
        while left := self.members():
            assert time.monotonic() - begin < PATIENCE, (
                f"orphans: {[_read(pid, 'cmdline').replace(bytes(1), b' ').decode() for pid in left]}"
            )
            time.sleep(0.002)
        return time.monotonic() - begin

    def kill_all(self) -> None:
        """Kill all processes that are left, for the end of a failed test."""
        for pid in [self.process.pid, *self.members()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def holders(memory: set[Memory]) -> list[int]:
    """Return the processes of this machine that still hold some of the memory."""
    return [pid for pid in _processes() if not memory.isdisjoint(_memfds(pid))]


def _processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _session(pid: int) -> int | None:
    """Return a process's session, None if it has ended (reaped or not)."""
    try:
        state, _, _, session = _stat(pid)[:4]
    except (OSError, IndexError):
        return None
    return None if state in "ZX" else int(session)


def _parent(pid: int) -> int:
    try:
        return int(_stat(pid)[1])
    except (OSError, IndexError):
        return 0


def _stat(pid: int) -> list[str]:
    """Return the fields after the name: state, parent, group, session, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _memfds(pid: int) -> Iterator[Memory]:
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        try:
            if os.readlink(f"{directory}/{name}").startswith("/memfd:batchvl"):
                status = os.stat(f"{directory}/{name}")
                yield status.st_dev, status.st_ino
        except OSError:
            pass
