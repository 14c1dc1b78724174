"""Fingerprints of manifests: two manifests have the same one if they have the same contents."""

from __future__ import annotations

import os
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

from ..errors import ManifestError
from .files import Files

ENDS = 2**20
"""Bytes at each end of a text file that are hashed."""
_TAR_ENDS = 2**14
"""The same of a tar: there may be tens of thousands."""
_MAX_FOOTER = 2**30
_NO_CONTENTS = blake2b(digest_size=16).digest()


def fingerprint(files: Files) -> str:
    """Return a blake2b hash over each file's relative path, size, and Parquet footer or both ends.

    Of text the first and last MiB count, of a tar the first and last 16 KiB. An image counts by its path and size
    alone. Neither modification times nor absolute paths count, so that a copied or restored manifest is the same one.

    Raises:
        ManifestError: A file cannot be read.
    """
    total = blake2b(digest_size=16)
    for name in files:
        path = files.directory / name
        try:
            # A dangling link to an image is a row, which fails later.
            size = (os.lstat if files.format == "images" and not path.exists() else os.stat)(path).st_size
            if files.format == "images":
                digest = _NO_CONTENTS
            else:
                ends = None if files.format == "parquet" else _TAR_ENDS if files.format == "webdataset" else ENDS
                digest = _contents_digest(path, size, ends)
        except OSError as error:
            raise ManifestError(f"{path}: cannot be read: {error.strerror}") from None
        total.update(b"%s\0%d\0%s" % (os.fsencode(name), size, digest))
    return total.hexdigest()


def _contents_digest(path: Path, size: int, ends: int | None) -> bytes:
    """Return a hash of so many bytes at each end of a file; of its footer if that is None."""
    digest = blake2b(digest_size=16)
    with open(path, "rb") as file:
        if ends is None:
            _hash_tail(digest, file, size, min(_footer_bytes(file, size), size))
        else:
            digest.update(file.read(ends))
            _hash_tail(digest, file, size, min(ends, max(0, size - ends)))
    return digest.digest()


def _footer_bytes(file: BinaryIO, size: int) -> int:
    """Return the size of a Parquet file's footer, whose length precedes the magic number at the end of the file."""
    if size < 12:
        return size
    file.seek(size - 8)
    return min(int.from_bytes(file.read(4), "little"), _MAX_FOOTER) + 8


def _hash_tail(digest: blake2b, file: BinaryIO, size: int, length: int) -> None:
    """Hash the last `length` bytes of a file."""
    file.seek(size - length)
    while length > 0 and (block := file.read(min(length, ENDS))):
        digest.update(block)
        length -= len(block)
