"""Pictures in files, opened only where a manifest may look."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import EmptyImage, ForbiddenPath, MissingFile, OptionError, TooManyBytes


def check_roots(folders: Iterable[str]) -> None:
    """Raises OptionError where an --image-root is no folder."""
    for folder in folders:
        if not os.path.isdir(folder):
            raise OptionError(f"--image-root: {folder} is no folder")


def open_beneath(path: str, roots: Sequence[Path], limit: int) -> bytes:
    """The bytes of a file that lies below one of `roots`, symbolic links resolved; at most `limit` of them.

    A relative path starts from `roots[0]`, the manifest's folder. Raises MissingFile, ForbiddenPath, TooManyBytes or
    EmptyPicture. The file is pinned first, then checked, then read through the pin, so nothing can be exchanged in
    between; and pinning (O_PATH) neither waits for a pipe's writer nor wakes a device.
    """
    with _pinned(path, roots, limit) as (pinned, _), open(pinned, "rb") as file:
        data = file.read(limit + 1)
    if not data:
        raise EmptyImage(f"{path}: has no bytes")
    if len(data) > limit:  # it grew meanwhile
        raise TooManyBytes(f"{path}: has more bytes than --max-image-bytes {limit:,}")
    return data


def check_beneath(path: str, roots: Sequence[Path], limit: int) -> None:
    """Raises what `open_beneath` would, as far as that can be told of a file without opening it."""
    with _pinned(path, roots, limit) as (pinned, size):
        if not size:
            raise EmptyImage(f"{path}: has no bytes")
        if not os.access(pinned, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextmanager
def _pinned(path: str, roots: Sequence[Path], limit: int) -> Iterator[tuple[str, int]]:
    """What opens a file that a manifest may look at, whatever stands at its path by now, and the file's size.

    An OSError while it is in use becomes MissingFile.
    """
    try:
        pin = os.open(os.path.join(roots[0], path), os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character
        raise MissingFile(f"{path!r}: {error}") from None
    try:
        pinned = f"/proc/self/fd/{pin}"
        real = os.readlink(pinned)
        # First as the root is named, which mostly does: resolving one costs more than all the rest.
        if not any(_below(real, os.fspath(root)) or _below(real, os.path.realpath(root)) for root in roots):
            raise ForbiddenPath(
                f"{path}: leads out of the manifest's folder ({roots[0]}); open another with --image-root"
            )
        found = os.fstat(pin)
        if not stat.S_ISREG(found.st_mode):
            raise MissingFile(f"{path}: is a {_kind(found.st_mode)}, want a file")
        if found.st_size > limit:
            raise TooManyBytes(f"{path}: has {found.st_size:,} bytes, more than --max-image-bytes {limit:,}")
        yield pinned, found.st_size
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(pin)


def _below(real: str, folder: str) -> bool:
    return real == folder or real.startswith(folder if folder.endswith("/") else folder + "/")


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
