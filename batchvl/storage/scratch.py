"""A folder for temporary files that does not outlive its use by much."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .disk import UNSUPPORTED

_LOCK = "lock"


@contextmanager
def scratch_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `parent`, named prefix and some letters, and removed with all that is in it at the end.

    What processes that were killed left behind under such names is removed at the start: the folder of a living process
    is locked, on whichever host that is. Where the file system has no locks it stays. Raises OSError.
    """
    for left in parent.glob(f"{prefix}*"):
        if (lock := _locked(left)) is not None:
            _remove(left, lock)
    folder, lock = _make(parent, prefix)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return folder, lock
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            continue  # somebody took it for a dead one's, in the moment before it was locked
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


def _locked(folder: Path) -> int | None:
    """The lock on the folder of a dead process; None where it may be a living one's."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove(folder: Path, lock: int) -> None:
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name != _LOCK:  # which tells the next one, should this one die over it
                path.unlink()
    os.close(lock)  # network file systems keep what is open
    shutil.rmtree(folder, ignore_errors=True)
