"""A model of what a power failure leaves of a directory: what was synced is there, anything else may be there or not.

POSIX promises only this: a file's bytes are on disk once the file is fsynced, a name once its directory is. Later
writes may be there in full, in part, or as zeros (a file that grew before it was filled). Of the names created, changed
and removed later, some may be on disk and others not. A renamed file keeps one of its names, as on every file system in
use.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import threading
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from batchvl.storage.disk import Disk

from .disks import Seam

_fsync = os.fsync
_Result = TypeVar("_Result")


@dataclass
class Names:
    """A directory's names with their inodes, as synced and at present."""

    synced: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)


@dataclass
class Content:
    """A file's bytes, as synced and at present."""

    synced: bytes = b""
    now: bytes = b""


@dataclass
class Moment:
    """The directories and files of a tree at one moment, by inode, and the rows reported as durable by then."""

    root: int
    directories: dict[int, Names]
    files: dict[int, Content]
    reported: frozenset[int] = frozenset()

    def leave(self, target: Path, draw: random.Random | None, *, new_names: bool = False) -> None:
        """Create the directory `target` as a power failure at this moment may leave it.

        Args:
            target: Directory to create.
            draw: Decides how much of what was not synced is there. None: nothing of it.
            new_names: Without `draw`, keep all names nevertheless, with files of the same length that end in zeros.
        """
        self._leave_directory(self.root, target, draw, new_names)

    def _leave_directory(self, inode: int, target: Path, draw: random.Random | None, new_names: bool) -> None:
        target.mkdir()
        for name, entry in self._surviving_names(self.directories[inode], draw, new_names).items():
            if entry in self.directories:
                self._leave_directory(entry, target / name, draw, new_names)
            else:
                (target / name).write_bytes(_content(self.files.get(entry, Content()), draw, new_names))

    def _surviving_names(self, names: Names, draw: random.Random | None, new_names: bool) -> dict[str, int]:
        if draw is None:
            return names.now if new_names else names.synced
        surviving = {}
        for name in sorted(names.synced.keys() | names.now.keys()):
            inode = draw.choice((names.synced, names.now)).get(name)
            if inode is not None:
                surviving[name] = inode
        for name, inode in names.now.items():
            if inode in names.synced.values() and inode not in surviving.values():
                surviving[name] = inode
        return surviving


class Recorder(Seam):
    """A disk that records what is synced below `root`, and takes a `Moment` before each call.

    Within its context it replaces os.fsync, so that syncs that bypass `Disk` count as well, such as those by the reader
    of an ended attempt's journal. From call number `fail_from` on, all calls fail: what was written by then is only in
    memory, as after a kill.

    Args:
        root: The directory.
        reported: Returns the rows reported as durable so far.
    """

    def __init__(self, root: Path, reported: Callable[[], Set[int]]) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self.fail_from: int | None = None
        self._root, self._reported = root, reported
        self._one_at_a_time = threading.RLock()
        self._synced_names: dict[int, dict[str, int]] = {}
        self._synced_bytes: dict[int, bytes] = {}
        self._open: dict[int, int] = {}

    def __enter__(self) -> Recorder:
        os.fsync = self._sync  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        os.fsync = _fsync
        for fd in self._open.values():
            os.close(fd)

    def _call(self, number: int, name: str, do: Callable[[], _Result], partly: Callable[[int], None] | None) -> _Result:
        with self._one_at_a_time:
            if self.fail_from is None or number < self.fail_from:
                self.moments.append(self.take())
                return do()
        if number == self.fail_from and partly is not None:
            partly(2)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def create(self, path: Path) -> int:
        fd = super().create(path)
        self._open[os.fstat(fd).st_ino] = os.dup(
            fd
        )  # keeps the inode number from being reused after the file is removed
        return fd

    def sync(self, fd: int) -> None:
        super().sync(fd)
        Disk.sync(self, fd)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        Disk.sync_directory(self, path)

    def take(self) -> Moment:
        """Return the present moment."""
        reported = frozenset(self._reported())  # first: rows reported later need not be there
        directories: dict[int, Names] = {}
        files: dict[int, Content] = {}

        def scan(path: Path, inode: int) -> None:
            names = directories[inode] = Names(dict(self._synced_names.get(inode, {})))
            for entry in os.scandir(path):
                names.now[entry.name] = entry.inode()
                if entry.is_dir():
                    scan(path / entry.name, entry.inode())
                else:
                    files[entry.inode()] = Content(
                        self._synced_bytes.get(entry.inode(), b""), (path / entry.name).read_bytes()
                    )

        scan(self._root, self._root.stat().st_ino)
        for names in list(directories.values()):  # removed files whose removal is not synced
            for inode in names.synced.values():
                if inode not in files and inode not in directories:
                    files[inode] = Content(*[self._synced_bytes.get(inode, b"")] * 2)
        return Moment(self._root.stat().st_ino, directories, files, reported)

    def _sync(self, fd: int) -> None:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            self._synced_names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(fd)}
        else:
            self._synced_bytes[status.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()


def _content(file: Content, draw: random.Random | None, zeros: bool) -> bytes:
    if draw is None:
        return file.synced + bytes(len(file.now) - len(file.synced)) if zeros else file.synced
    added = file.now[len(file.synced) :]
    kept = draw.randint(0, len(added))
    tail = bytes(draw.randint(0, len(added) - kept)) if draw.random() < 0.5 else b""
    return file.synced + added[:kept] + tail
