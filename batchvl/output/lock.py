"""The lock on a shard's folder: one runner at a time, as far as the file system can tell."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from ..errors import ResumeError
from .disk import UNSUPPORTED

log = logging.getLogger(__name__)


class Holder(msgspec.Struct):
    """Who holds a lock: the lock file's content."""

    host: str
    pid: int
    since: str
    """UTC, ISO 8601."""

    @classmethod
    def me(cls) -> Holder:
        """This process, from now."""
        return cls(socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"))


class Lock:
    """An flock, gone with the process that took it; the file's content is for people.

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
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, msgspec.json.encode(Holder.me()) + b"\n", 0)
        except OSError:
            os.close(self._fd)
            raise

    def release(self) -> None:
        """Gives the lock back. The file stays: were it removed, two runners could hold two files of that name."""
        try:
            os.ftruncate(self._fd, 0)
        except OSError:
            pass  # the content is for people: closing is what counts
        os.close(self._fd)


def _holder(fd: int) -> Holder | None:
    try:
        return msgspec.json.decode(os.pread(fd, 4096, 0), type=Holder)
    except msgspec.DecodeError:
        return None
