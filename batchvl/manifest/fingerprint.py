"""What tells one manifest from another: `fingerprint`."""

from __future__ import annotations

import os
from hashlib import blake2b
from typing import BinaryIO

from ..errors import ManifestError
from .files import Files

ENDS = 2**20
"""Bytes at each end of a text file that are hashed."""
_MAX_FOOTER = 2**30


def fingerprint(files: Files) -> str:
    """blake2b over each file's relative path, size and Parquet footer, or first and last MiB of text.

    A picture counts by its path and size alone. Neither modification times nor absolute paths count, so that a copied
    or restored manifest is the same one. Raises ManifestError where a file cannot be read.
    """
    total = blake2b(digest_size=16)
    for name in files:
        path = files.folder / name
        try:
            size = (os.lstat if files.format == "pictures" and not path.exists() else os.stat)(path).st_size
            own = blake2b(digest_size=16)
            if files.format != "pictures":
                with open(path, "rb") as file:
                    if files.format == "parquet":
                        _hash_tail(own, file, size, min(_footer(file, size), size))
                    else:
                        own.update(file.read(ENDS))
                        _hash_tail(own, file, size, min(ENDS, max(0, size - ENDS)))
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
        total.update(b"%s\0%d\0%s" % (os.fsencode(name), size, own.digest()))
    return total.hexdigest()


def _footer(file: BinaryIO, size: int) -> int:
    """Bytes of a Parquet file's footer: its length stands before the magic number at the end."""
    if size < 12:
        return size
    file.seek(size - 8)
    return min(int.from_bytes(file.read(4), "little"), _MAX_FOOTER) + 8


def _hash_tail(own: blake2b, file: BinaryIO, size: int, length: int) -> None:
    file.seek(size - length)
    while length > 0 and (block := file.read(min(length, ENDS))):
        own.update(block)
        length -= len(block)
