"""A directory for temporary files that is removed even after its process was killed."""

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
    """Create a directory in `parent` whose name starts with `prefix`; remove it with its contents at the end.

    Directories with such names that killed processes have left behind are removed first. The directory of a living
    process, on any host, is protected by a lock. On a file system without locks, leftovers remain. Raises OSError.
    """
    for leftover in parent.glob(f"{prefix}*"):
        if (lock := _lock_dead(leftover)) is not None:
            _remove(leftover, lock)
    directory, lock = _make(parent, prefix)
    try:
        yield directory
    finally:
        _remove(directory, lock)


def _make(parent: Path, prefix: str) -> tuple[Path, int]:
    while True:
        directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNSUPPORTED:
                return directory, lock
            os.close(lock)
            if not isinstance(error, BlockingIOError):
                raise
            continue  # another process took it for a leftover before it was locked
        if os.fstat(lock).st_nlink:
            return directory, lock
        os.close(lock)


def _lock_dead(directory: Path) -> int | None:
    """Lock the directory of a dead process; return None if the process may be alive."""
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock


def _remove(directory: Path, lock: int) -> None:
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name != _LOCK:  # which marks a leftover, should this process die here
                path.unlink()
    os.close(lock)  # network file systems keep open files
    shutil.rmtree(directory, ignore_errors=True)
