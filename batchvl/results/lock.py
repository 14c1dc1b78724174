"""The lock on a shard's directory: one runner at a time, as far as the file system can tell."""

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

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 30.0
"""Time between two heartbeats of a runner."""
_LENGTH = 512
"""Bytes of a lock file, padded with spaces: each write covers the previous one."""


class Holder(msgspec.Struct, omit_defaults=True):
    """The contents of a lock file: the process that holds the lock."""

    host: str
    pid: int
    since: str
    """UTC, ISO 8601."""
    start: str = ""
    """Distinguishes this process from any other with the same `pid`: boot ID, PID namespace and start time."""
    total: int | None = None
    """Number of rows in the manifest as the holder knows it, for text an estimate."""

    @classmethod
    def me(cls) -> Holder:
        """Return this process as a holder, from now."""
        pid, since = os.getpid(), datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), pid, since, f"{_pid_scope()} {_start_time(pid)}")

    def alive(self) -> bool | None:
        """Whether the process is alive; None if that is unknown here, on another host or in another container.

        >>> Holder.me().alive()
        True
        """
        # Do not try the lock itself: even a shared one, held for a moment, would reject a runner that starts in that
        # moment. /proc/locks does not list locks that a file system keeps elsewhere. Looking at a process has no side
        # effect, and its start time shows whether the PID has been reused.
        scope, _, start = self.start.rpartition(" ")
        if not scope or scope != _pid_scope():
            return None
        current = _start_time(self.pid)
        return None if current is None else current == start


class Lock:
    """An flock, released when the process that holds it ends. The file's contents name the holder.

    The descriptor is closed on exec; a forked child that lives on without exec would keep the lock.
    """

    def __init__(self, path: Path) -> None:
        """Take the lock.

        On a file system without locks (some Lustre mounts), log a warning and continue: two runners in one directory
        answer rows twice, and the output still has each row once.

        Raises:
            ResumeError: another process holds the lock.
            OSError: the file cannot be written.
        """
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _decode_holder(self._fd)
            os.close(self._fd)
            who = f"host {holder.host}, process {holder.pid}, since {holder.since}" if holder else "unknown process"
            raise ResumeError(
                f"{path.parent}: in use by another runner ({who}): wait until it ends, stop it, or choose another "
                f"output directory with -o"
            ) from None
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                os.close(self._fd)
                raise
            logger.warning(
                "%s: this file system does not support locks: make sure that no other runner uses this directory",
                path.parent,
            )
        self._me, self._writing = Holder.me(), threading.Lock()
        try:
            self.heartbeat(None)
        except OSError:
            os.close(self._fd)
            raise

    def heartbeat(self, total: int | None) -> Holder:
        """Rewrite the file, so that its modification time shows on any host that the holder is alive. Thread-safe.

        Args:
            total: Number of rows in the manifest, possibly estimated.

        Raises:
            OSError: the file cannot be written.
        """
        with self._writing:
            if self._fd >= 0:  # after the release, the descriptor may belong to another file
                self._me.total = total
                os.pwrite(self._fd, msgspec.json.encode(self._me).ljust(_LENGTH - 1) + b"\n", 0)
            return self._me

    def release(self) -> None:
        """Release the lock. The file remains: if it were removed, two runners could lock two files of that name."""
        with self._writing:
            fd, self._fd = self._fd, -1
            try:
                os.ftruncate(fd, 0)
            except OSError:
                pass  # closing the file releases the lock
            os.close(fd)


def read_holder(path: Path) -> Holder | None:
    """Return the process that holds the lock or died with it; None if it was released or never taken.

    Does not touch the lock. Raises OSError.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return _decode_holder(fd)
    finally:
        os.close(fd)


def _decode_holder(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except msgspec.DecodeError:
        return None


def _pid_scope() -> str:
    """Return the scope in which a PID is meaningful: boot ID and PID namespace; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str | None:
    """Return the process's start time in clock ticks since boot; "" if it has ended, None if it is hidden.

    Not from psutil: its `create_time()` is in seconds since the epoch, which change whenever the clock is set, while
    lock files hold ticks; and it does not distinguish a hidden process from one that has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None if _exists(pid) else ""  # /proc can hide processes of other users (hidepid)
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
