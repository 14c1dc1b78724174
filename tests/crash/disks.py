"""Disks that kill the process or fail at one of the calls on which answers depend."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from batchvl.storage.disk import Disk

_Result = TypeVar("_Result")


class Seam(Disk):
    """Passes every call through `_call`, numbered from 1. Does not sync: there is no power failure here."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.names: list[str] = []
        """Names of the calls so far."""

    def _call(self, number: int, name: str, do: Callable[[], _Result], partly: Callable[[int], None] | None) -> _Result:
        """Make the call `name`. `partly(n)` does the first n-th of it; None if it cannot be done in part."""
        return do()

    def _count(self, name: str, do: Callable[[], _Result], partly: Callable[[int], None] | None = None) -> _Result:
        with self._lock:
            self.names.append(name)
            number = len(self.names)
        return self._call(number, name, do, partly)

    def create(self, path: Path) -> int:
        return self._count("create", lambda: super(Seam, self).create(path))

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)

        def partly(divisor: int) -> None:
            Disk.write(self, fd, view[: max(1, len(view) // divisor)])

        self._count("write", lambda: super(Seam, self).write(fd, view), partly)

    def sync(self, fd: int) -> None:
        self._count("sync", lambda: None)

    def close(self, fd: int) -> None:
        # As on Linux, the descriptor is closed even if the call fails.
        try:
            self._count("close", lambda: None)
        finally:
            super().close(fd)

    def rename(self, source: Path, target: Path) -> None:
        self._count("rename", lambda: super(Seam, self).rename(source, target))

    def link(self, source: Path, target: Path) -> None:
        self._count("link", lambda: super(Seam, self).link(source, target))

    def remove(self, path: Path) -> None:
        self._count("remove", lambda: super(Seam, self).remove(path))

    def sync_directory(self, path: Path) -> None:
        self._count("sync_directory", lambda: None)


class Killing(Seam):
    """Kills the process with SIGKILL before or after call number `at`.

    With `when="middle"`, kills it in the middle of write number `at`, when 1/`part` of the bytes are written.
    """

    def __init__(self, at: int, when: str = "before", part: int = 2) -> None:
        super().__init__()
        self._at, self._when, self._part = at, when, part
        self._writes = itertools.count(1)

    def _call(self, number: int, name: str, do: Callable[[], _Result], partly: Callable[[int], None] | None) -> _Result:
        if self._when == "middle":
            if partly is not None and next(self._writes) == self._at:
                partly(self._part)
                _die()
            return do()
        if number != self._at:
            return do()
        if self._when == "before":
            _die()
        try:
            return do()
        finally:
            _die()


class Failing(Seam):
    """Fails with an error at call number `at` and all later ones, or with `once` at that one alone.

    A failing write has written half of its bytes. Removing files works on a full disk.
    """

    def __init__(self, at: int, code: int = errno.EIO, *, once: bool = False) -> None:
        super().__init__()
        self._at, self._code, self._once = at, code, once
        self.failed: list[str] = []
        """Names of the calls that failed."""

    def _call(self, number: int, name: str, do: Callable[[], _Result], partly: Callable[[int], None] | None) -> _Result:
        if number < self._at or (self._once and number > self._at):
            return do()
        if name == "remove" and self._code in (errno.ENOSPC, errno.EDQUOT):
            return do()
        if partly is not None:
            partly(2)
        self.failed.append(name)
        raise OSError(self._code, os.strerror(self._code))


class NoLinks(Seam):
    """A file system without hard links: some FUSE mounts, SMB, FAT."""

    def link(self, source: Path, target: Path) -> None:
        def refuse() -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        self._count("link", refuse)


class KillingNoLinks(NoLinks, Killing):
    """Kills the process, on a file system without hard links."""


def disk_of(spec: dict[str, Any]) -> Disk:
    """Return the disk that a JSON object describes.

    {"kill": 17, "when": "before"} kills, {"fail": 17, "code": "ENOSPC", "once": false} fails, {} only counts.

    >>> isinstance(disk_of({"fail": 3, "code": "EIO"}), Failing)
    True
    """
    match spec:
        case {"kill": int(at), **more}:
            return (KillingNoLinks if more.pop("no_links", False) else Killing)(at, **more)
        case {"fail": int(at), "code": str(code), **more}:
            return Failing(at, getattr(errno, code), **more)
    return NoLinks() if spec.get("no_links") else Seam()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
