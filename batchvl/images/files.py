"""Images in files, opened only in the directories that a manifest may read."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import EmptyImage, ForbiddenPath, MissingFile, OptionError, TooManyBytes


def check_roots(directories: Iterable[str]) -> None:
    """Raise OptionError if an --image-root is not a directory."""
    for directory in directories:
        if not os.path.isdir(directory):
            raise OptionError(f"--image-root: {directory} is not a directory")


def open_beneath(path: str, roots: Sequence[Path], max_bytes: int) -> bytes:
    """Return the bytes of a file below one of the roots, symbolic links resolved.

    The file is pinned, then checked, then read through the pin, so that nobody can replace it in between. Pinning
    (O_PATH) neither waits for the writer of a pipe nor wakes a device.

    Args:
        path: An absolute path, or one relative to the first root.
        roots: The manifest's directory, and others that are allowed.
        max_bytes: Largest size of the file.

    Raises:
        MissingFile, ForbiddenPath, TooManyBytes, EmptyImage: The file cannot be used.
    """
    with pinned(path, roots, max_bytes) as (pin, _), open(pin, "rb") as file:
        data = file.read(max_bytes + 1)
    if not data:
        raise EmptyImage(f"{path}: has no bytes")
    if len(data) > max_bytes:  # it has grown since
        raise TooManyBytes(f"{path}: has more bytes than --max-image-bytes {max_bytes:,}")
    return data


def check_beneath(path: str, roots: Sequence[Path], max_bytes: int) -> None:
    """Raise what `open_beneath` would raise, as far as that is known without opening the file."""
    with pinned(path, roots, max_bytes) as (pin, size):
        if not size:
            raise EmptyImage(f"{path}: has no bytes")
        if not os.access(pin, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def pinned(path: str, roots: Sequence[Path], max_bytes: int = sys.maxsize) -> Iterator[tuple[str, int]]:
    """Yield a path that opens the file even if another one is at its path by now, and the size of the file.

    An OSError inside the block becomes MissingFile.

    Args:
        path: As in `open_beneath`.
        roots: As in `open_beneath`.
        max_bytes: Largest size of the file.

    Raises:
        MissingFile, ForbiddenPath, TooManyBytes: The file cannot be used.
    """
    try:
        fd = os.open(os.path.join(roots[0], path), os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character
        raise MissingFile(f"{path!r}: {error}") from None
    try:
        pin = f"/proc/self/fd/{fd}"
        real = os.readlink(pin)
        # The root as given is mostly the resolved one already, and resolving costs more than all the rest.
        if not any(_below(real, os.fspath(root)) or _below(real, os.path.realpath(root)) for root in roots):
            raise ForbiddenPath(
                f"{path}: is outside the manifest's directory ({roots[0]}); allow another with --image-root"
            )
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise MissingFile(f"{path}: is a {_kind(status.st_mode)}, expected a file")
        if status.st_size > max_bytes:
            raise TooManyBytes(f"{path}: has {status.st_size:,} bytes, more than --max-image-bytes {max_bytes:,}")
        yield pin, status.st_size
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(fd)


def _below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory if directory.endswith("/") else directory + "/")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "directory", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
