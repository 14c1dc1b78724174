"""The lock on a shard's folder: one runner at a time, as far as the file system can tell."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ..errors import ResumeError
from ..storage.disk import UNSUPPORTED

log = logging.getLogger(__name__)

BEAT_SECONDS = 30.0
"""How often a holder says that it lives."""
_LENGTH = 512
"""Bytes that a lock file's content takes, filled up with spaces: each of its writes covers the one before."""


class Holder(msgspec.Struct, omit_defaults=True):
    """Who holds a lock: the lock file's content."""

    host: str
    pid: int
    since: str
    """UTC, ISO 8601."""
    start: str = ""
    """What tells this process from any other that has the number `pid`: boot, PID namespace, and when it started."""
    total: int | None = None
    """The manifest's rows as well as the holder knows, for text an estimate."""

    @classmethod
    def me(cls) -> Holder:
        """This process, from now."""
        pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, since, f"{_machine()} {_started(pid)}")

    def alive(self) -> bool | None:
        """Whether the process lives; None where that cannot be told from here: another host, another container.

        >>> Holder.me().alive()
        True
        """
        # The lock itself is not tried: even a shared one, held for a moment, would turn away a runner that starts at
        # that moment. /proc/locks tells of no lock that a file system keeps elsewhere. A process can be looked at
        # without it noticing; its start tells whether the number has been given to another one since.
        machine, _, started = self.start.rpartition(" ")
        if not machine or machine != _machine():
            return None
        found = _started(self.pid)
        return None if found is None else found == started


class Lock:
    """An flock, gone with the process that took it; the file tells people and `status` whose it is.

    The descriptor is closed on exec; a child that is forked and lives on without exec would keep the lock.
    """

    def __init__(self, path: Path) -> None:
        """Takes the lock. Raises ResumeError telling who holds it, and OSError.

        On a file system without locks (some Lustre mounts) it is taken all the same, with a warning: two runners in one
        folder answer rows twice, and the output still has each once.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = _holder(self._fd)
            os.close(self._fd)
            who = f"host {found.host}, process {found.pid}, since {found.since}" if found else "it has not said who"
            raise ResumeError(
                f"{path.parent}: another runner is at work here ({who}): wait for its end, stop it, or choose another "
                f"output folder with -o"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(self._fd)
                raise
            log.warning("%s: this file system has no locks: see to it that no other runner works here", path.parent)
        self._me, self._writing = Holder.me(), threading.Lock()
        try:
            self.beat(None)
        except OSError:
            os.close(self._fd)
            raise

    def beat(self, total: int | None) -> Holder:
        """Writes the file anew, so that its time says that the holder lives, wherever that is read from.

        total: the manifest's rows, as well as they are known. May be called in any thread. Raises OSError.
        """
        with self._writing:
            if self._fd >= 0:  # else it was released meanwhile, and the number may be another file's
                self._me.total = total
                os.pwrite(self._fd, msgspec.json.encode(self._me).ljust(_LENGTH - 1) + b"\n", 0)
            return self._me

    def release(self) -> None:
        """Gives the lock back. The file stays: were it removed, two runners could hold two files of that name."""
        with self._writing:
            fd, self._fd = self._fd, -1
            try:
                os.ftruncate(fd, 0)
            except OSError:
                pass  # closing is what counts
            os.close(fd)


def holder(path: Path) -> Holder | None:
    """Who holds the lock, or died with it; None where the last one gave it back, or nobody has ever had it.

    Only reads. Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _holder(fd)
    finally:
        os.close(fd)


def _holder(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except msgspec.DecodeError:
        return None


def _machine() -> str:
    """Where a process's number means something: the boot of the machine and the PID namespace; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process started, in ticks since the boot; "" where it has ended, None where that is hidden from us."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if _exists(pid) else ""  # /proc can hide what is another user's (hidepid)
    return "" if fields[0] in "ZX" else fields[19]  # ended, though nobody has reaped it yet


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
