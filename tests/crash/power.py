"""A model of what a power failure leaves of a folder: what was synced is there, all else may be or not.

POSIX promises no more than this: a file's bytes are on the disk once the file is fsynced, a name once its folder is.
What was written since may have got there as a whole, in part, or as zeros (a file that grew before it was filled); of
the names made, changed and removed since, some may be on the disk and others not. A file that has been renamed keeps
one of its names: every file system in use sees to that much.
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
    """A folder's names, each with its inode: as synced, and as of now."""

    synced: dict[str, int] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)


@dataclass
class Content:
    """A file's bytes: as synced, and as of now."""

    synced: bytes = b""
    now: bytes = b""


@dataclass
class Moment:
    """All below a folder at one moment: folders and files by inode, and what had been reported as durable by then."""

    root: int
    folders: dict[int, Names]
    files: dict[int, Content]
    told: frozenset[int] = frozenset()

    def leave(self, target: Path, draw: random.Random | None, *, new_names: bool = False) -> None:
        """Makes the folder `target` as a power failure at this moment may leave it.

        draw: what was not synced is there, in part, or not, as drawn. Without it nothing of that is there: with
        `new_names` all names are nevertheless, of files which are as long as they were, but of zeros.
        """
        self._leave_folder(self.root, target, draw, new_names)

    def _leave_folder(self, inode: int, target: Path, draw: random.Random | None, new_names: bool) -> None:
        target.mkdir()
        for name, found in self._chosen(self.folders[inode], draw, new_names).items():
            if found in self.folders:
                self._leave_folder(found, target / name, draw, new_names)
            else:
                (target / name).write_bytes(_content(self.files.get(found, Content()), draw, new_names))

    def _chosen(self, names: Names, draw: random.Random | None, new_names: bool) -> dict[str, int]:
        if draw is None:
            return names.now if new_names else names.synced
        chosen = {}
        for name in sorted(names.synced.keys() | names.now.keys()):
            found = draw.choice((names.synced, names.now)).get(name)
            if found is not None:
                chosen[name] = found
        for name, inode in names.now.items():
            if inode in names.synced.values() and inode not in chosen.values():
                chosen[name] = inode
        return chosen


class Recorder(Seam):
    """A disk that remembers what of the folder below `root` was synced, and takes a `Moment` before each call.

    Inside `with`, os.fsync is its own: what is synced by other ways than `Disk`, as by the reader of a dead attempt's
    journal, counts as well. `reported` tells which rows have been reported as durable. `fail_from` is the number of the
    first call that fails, and all later ones do: what was written by then is as a kill leaves it, in memory alone.
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
        self._open[os.fstat(fd).st_ino] = os.dup(fd)  # so that its inode's number stays its own once it is removed
        return fd

    def sync(self, fd: int) -> None:
        super().sync(fd)
        Disk.sync(self, fd)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(path)
        Disk.sync_directory(self, path)

    def take(self) -> Moment:
        """The moment that is now."""
        told = frozenset(self._reported())  # first: what is told later need not be there
        folders: dict[int, Names] = {}
        files: dict[int, Content] = {}

        def look(path: Path, inode: int) -> None:
            names = folders[inode] = Names(dict(self._synced_names.get(inode, {})))
            for entry in os.scandir(path):
                names.now[entry.name] = entry.inode()
                if entry.is_dir():
                    look(path / entry.name, entry.inode())
                else:
                    files[entry.inode()] = Content(
                        self._synced_bytes.get(entry.inode(), b""), (path / entry.name).read_bytes()
                    )

        look(self._root, self._root.stat().st_ino)
        for names in list(folders.values()):  # files that have lost their names, the removal of which is not synced
            for inode in names.synced.values():
                if inode not in files and inode not in folders:
                    files[inode] = Content(*[self._synced_bytes.get(inode, b"")] * 2)
        return Moment(self._root.stat().st_ino, folders, files, told)

    def _sync(self, fd: int) -> None:
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._synced_names[found.st_ino] = {entry.name: entry.inode() for entry in os.scandir(fd)}
        else:
            self._synced_bytes[found.st_ino] = Path(f"/proc/self/fd/{fd}").read_bytes()


def _content(file: Content, draw: random.Random | None, zeros: bool) -> bytes:
    if draw is None:
        return file.synced + bytes(len(file.now) - len(file.synced)) if zeros else file.synced
    added = file.now[len(file.synced) :]
    there = draw.randint(0, len(added))
    tail = bytes(draw.randint(0, len(added) - there)) if draw.random() < 0.5 else b""
    return file.synced + added[:there] + tail
