"""Pictures in files, opened only where a manifest may look."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from ..errors import EmptyPicture, ForbiddenPath, MissingFile, TooManyBytes


def open_beneath(path: str, roots: Sequence[Path], limit: int) -> bytes:
    """The bytes of a file that lies below one of `roots`, symbolic links resolved; at most `limit` of them.

    A relative path starts from `roots[0]`, the manifest's folder. Raises MissingFile, ForbiddenPath, TooManyBytes or
    EmptyPicture. The file is pinned first, then checked, then read through the pin, so nothing can be exchanged in
    between; and pinning (O_PATH) neither waits for a pipe's writer nor wakes a device.
    """
    try:
        pin = os.open(roots[0] / path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise MissingFile(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a NUL character
        raise MissingFile(f"{path!r}: {error}") from None
    try:
        pinned = f"/proc/self/fd/{pin}"
        real = os.readlink(pinned)
        if not any(Path(real).is_relative_to(os.path.realpath(root)) for root in roots):
            raise ForbiddenPath(
                f"{path}: leads out of the manifest's folder ({roots[0]}); open another with --image-root"
            )
        found = os.fstat(pin)
        if not stat.S_ISREG(found.st_mode):
            raise MissingFile(f"{path}: is a {_kind(found.st_mode)}, want a file")
        if found.st_size > limit:
            raise TooManyBytes(f"{path}: has {found.st_size:,} bytes, more than --max-image-bytes {limit:,}")
        with open(pinned, "rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise MissingFile(f"{path}: cannot be read: {error.strerror}") from None
    finally:
        os.close(pin)
    if not data:
        raise EmptyPicture(f"{path}: has no bytes")
    if len(data) > limit:  # it grew meanwhile
        raise TooManyBytes(f"{path}: has more bytes than --max-image-bytes {limit:,}")
    return data


def _kind(mode: int) -> str:
    kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")
