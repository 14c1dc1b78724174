"""A run as a process of its own, with all that it starts: its members, what they hold, and their end."""

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

KINDS = ("runner", "engine", "worker", "host", "guardian", "all")
"""What can be killed: the runner alone, what it started, or all at once, as with the node's memory or the node."""
ENDING = ("runner", "all")
"""The kinds that end the run there and then."""

_MODULES = {
    "host": "batchvl.images.forkserver",
    "engine": "batchvl.serving.engine_main",
    "guardian": "batchvl.ipc.watchdog",
}
_SHARED = ("/dev/shm/", "/SYSV")
_ROOT = Path(__file__).parents[2]

Memory = tuple[int, int]
"""A memfd, by device and inode."""


class Life:
    """One run of the command, in a session of its own.

    A session is what every process inherits and keeps, also once its parent is gone, unless it makes one of its own,
    which batchvl's processes do not: all that the run started are found by it.
    """

    def __init__(self, arguments: Sequence[str], log: Path, **settings: Any) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                **{"env": environment(PYTHONPATH=str(_ROOT)), **settings},
            )  # fmt: skip
        self.started = time.monotonic()

    @property
    def said(self) -> str:
        """All that it has said so far."""
        return self._log.read_text(errors="replace")

    @property
    def ended(self) -> bool:
        """Whether the runner has ended."""
        return self.process.poll() is not None

    def members(self) -> list[int]:
        """Its processes that live, whoever their parents are by now."""
        return [pid for pid in _processes() if _session(pid) == self.process.pid]

    def find(self, kind: str) -> list[int]:
        """The processes of a kind, of which there may be none at this moment."""
        members = self.members()
        if kind == "all":
            return members
        if kind == "runner":
            return [self.process.pid] if self.process.pid in members else []
        named = [pid for pid in members if _MODULES.get(kind, _MODULES["host"]).encode() in _read(pid, "cmdline")]
        if kind == "guardian" or kind == "engine":
            return named
        forked = [pid for pid in named if _parent(pid) in named]
        return forked if kind == "worker" else [pid for pid in named if pid not in forked]

    def kill(self, kind: str, draw: random.Random) -> bool:
        """Kills one of the kind, or all there are, with SIGKILL. False where there was none."""
        found = self.find(kind)
        draw.shuffle(found)
        killed = 0
        for pid in found if kind == "all" else found[:1]:
            try:
                os.kill(pid, signal.SIGKILL)
                killed += 1
            except ProcessLookupError:
                pass
        return killed > 0

    def memory(self) -> set[Memory]:
        """The shared memory that its processes hold at this moment.

        Raises AssertionError where one of them maps memory that has a name: that would outlive it.
        """
        found = set()
        for pid in self.members():
            found |= set(_memfds(pid))
            named = [line for line in _read(pid, "maps").decode().splitlines() if any(s in line for s in _SHARED)]
            assert not named, f"{_read(pid, 'cmdline')!r} maps shared memory with a name: {named[0]}"
        return found

    def wait(self) -> int:
        """Its exit code, once it has ended by itself."""
        return self.process.wait(PATIENCE)

    def wait_for_the_last(self) -> float:
        """How many seconds after this call its last process was gone. The runner must have ended."""
        begin = time.monotonic()
        while left := self.members():
            assert time.monotonic() - begin < PATIENCE, (
                f"orphans: {[_read(pid, 'cmdline').replace(bytes(1), b' ').decode() for pid in left]}"
            )
            time.sleep(0.002)
        return time.monotonic() - begin

    def put_an_end(self) -> None:
        """Kills what is left, whatever happened: for the end of a test that failed."""
        for pid in [self.process.pid, *self.members()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait()


def held_by_anybody(memory: set[Memory]) -> list[int]:
    """The processes of this machine that hold some of that memory still."""
    return [pid for pid in _processes() if not memory.isdisjoint(_memfds(pid))]


def _processes() -> Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def _session(pid: int) -> int | None:
    """A process's session; None where it has ended, reaped or not."""
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
    """The fields after the name: state, parent, group, session, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _memfds(pid: int) -> Iterator[Memory]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        try:
            if os.readlink(f"{folder}/{name}").startswith("/memfd:batchvl"):
                found = os.stat(f"{folder}/{name}")
                yield found.st_dev, found.st_ino
        except OSError:
            pass
