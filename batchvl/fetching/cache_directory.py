"""The directory of `--cache`: images on a disk, found again by their URLs, in later runs and by other processes.

    DIR/urls/5e/5e88…      the SHA-256 of the image that a URL led to, and when; the name is the SHA-256 of the URL
    DIR/images/9f/9f86…    an image; the name is the SHA-256 of its bytes

Any number of processes use a directory at the same time, on several machines if these share the file system. They need
no locks and no server: a file is written under a temporary name and then renamed, so nobody reads half of one, and
each image is checked against its name when it is read, so what a crash or a bad disk leaves counts as absent.

The size is bounded without a total that somebody would have to keep. Names are hashes, so parts of the directory that
have the same number of names grow alike. After a certain number of bytes a process looks at the next part, and removes
the files that were used least recently if there is more than its share. The time of a file's last use is its time of
modification, which a reader sets anew from time to time.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from hashlib import sha256
from heapq import nsmallest
from pathlib import Path
from secrets import token_hex
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from ..storage.disk import Disk

MAX_EVICTED = 4096
"""Files that are removed after one look at a part: their names are in memory."""
OVERSHOOT = 8
"""One part in so many of the maximum size is stored until each part has been looked at."""
TEMPORARY_SECONDS = 3600.0
"""Age of a temporary file whose process is taken to have died."""
_TOUCH_SECONDS = 600.0
"""Shortest time after which a use is recorded again."""
MIN_PART_BYTES = 256 * 2**20
"""Smallest share of a part: many times the size of a large image."""
_BLOCK = 4096
"""Sizes are counted in blocks of so many bytes."""
_DIRECTORIES = 256
_LARGE_BYTES = 2 * 2**20
"""Images that are larger are read one after another, so that the memory for them is bounded."""
_MAX_ENTRY_BYTES = 1024
_IMAGES, _URLS = "images", "urls"
_NAME = re.compile(r"[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Images that batchvl keeps (--cache). They may be removed.\n"
"""Contents of CACHEDIR.TAG, for which backups leave out a directory (https://bford.info/cachedir/)."""


class _Entry(msgspec.Struct):
    """What a URL led to."""

    sha256: Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
    fetched: float
    """Time of the fetch, in seconds since 1970."""


class _File(NamedTuple):
    used: float
    size: int
    path: Path


class CacheDirectory:
    """Images in a directory. All methods block, and threads may call them at the same time.

    Args:
        path: The directory.
        max_bytes: Approximate limit of the size of all files.
        max_age: Seconds after its fetch for which an image is found.
        disk: Writes the files.

    Attributes:
        evicted: Number of images that were removed to keep the size.
        damaged: Number of images that were removed because their bytes had changed.
    """

    def __init__(self, path: Path, max_bytes: int, max_age: float, disk: Disk | None = None) -> None:
        self._path, self._max_age, self._disk = path, max_age, disk or Disk()
        parts = min(max(max_bytes // MIN_PART_BYTES, 1), _DIRECTORIES)
        self._parts = 1 << (parts.bit_length() - 1)
        self._part_bytes = max_bytes // self._parts
        self._lock, self._large_reads = threading.Lock(), threading.Lock()
        # Random, so that many processes that store little each look at all parts as often as one that stores much.
        self._next_part = random.randrange(self._parts)
        self._unseen_bytes = random.randrange(self._part_bytes // OVERSHOOT + 1)
        self.evicted = self.damaged = 0

    def open(self) -> None:
        """Create the directory, for this user alone, unless it exists. Raises OSError if it cannot be used."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self._path.mkdir(0o700)
        os.scandir(self._path).close()
        tag = self._path / "CACHEDIR.TAG"
        with suppress(OSError):  # one that cannot be written can be read all the same
            if not tag.exists():
                self._disk.put(tag, _TAG)

    def find(self, url: str, max_bytes: int) -> bytes | None:
        """Return the image that a URL led to; None if it is not here, too old, too large or damaged.

        Args:
            url: The URL, or any other text that stands for the image.
            max_bytes: Limit of the image's bytes.

        Raises:
            OSError: The disk cannot be read.
        """
        record = self._read(self._place(_URLS, _hash(url)), _MAX_ENTRY_BYTES)
        if record is None:
            return None
        try:
            entry = msgspec.json.decode(record, type=_Entry)
        except msgspec.DecodeError:
            return None
        if abs(time.time() - entry.fetched) >= self._max_age:  # a clock that was ahead must not make it immortal
            return None
        place = self._place(_IMAGES, entry.sha256)
        data = self._read(place, max_bytes)
        if data is not None and sha256(data).hexdigest() != entry.sha256:
            self._disk.discard(place)
            with self._lock:
                self.damaged += 1
            return None
        return data

    def store(self, url: str, data: bytes) -> None:
        """Keep an image, and remove others if there are too many.

        Args:
            url: As for `find`.
            data: The image. What the URL led to before is forgotten.

        Raises:
            OSError: The disk cannot be written.
        """
        name, stored = sha256(data).hexdigest(), _BLOCK
        place = self._place(_IMAGES, name)
        if self._has(place, len(data)):
            _touch(place)
        else:
            self._write(place, data)
            stored += _size(len(data))
        self._write(self._place(_URLS, _hash(url)), msgspec.json.encode(_Entry(name, time.time())))
        part = self._due_part(stored)
        if part is not None:
            self._trim(part)

    def _place(self, kind: str, name: str) -> Path:
        return self._path / kind / name[:2] / name

    def _read(self, place: Path, max_bytes: int) -> bytes | None:
        """Return the bytes of a file and record its use; None if it does not exist or is too large."""
        try:
            with place.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size > max_bytes:
                    return None
                with self._large_reads if status.st_size > _LARGE_BYTES else nullcontext():
                    data = file.readall()
                if abs(time.time() - status.st_mtime) > _TOUCH_SECONDS:
                    _touch(file.fileno())
                return data
        except OSError as error:
            if error.errno in _ABSENT:
                return None
            raise

    def _has(self, place: Path, length: int) -> bool:
        try:
            return place.stat().st_size == length
        except OSError as error:
            if error.errno in _ABSENT:
                return False
            raise

    def _write(self, place: Path, data: bytes) -> None:
        """Write a file, whole or not at all, replacing an existing one."""
        temporary = place.with_name(f".{token_hex(8)}.tmp")
        file = self._create(temporary)
        try:
            try:
                self._disk.write(file, data)
            finally:
                self._disk.close(file)
            # Not synced: after a power failure the hash shows what is missing.
            self._disk.rename(temporary, place)
        except OSError:
            self._disk.discard(temporary)
            raise

    def _create(self, place: Path) -> int:
        try:
            return self._disk.create(place)
        except FileNotFoundError:
            for directory in (place.parent.parent, place.parent):
                with suppress(FileExistsError):
                    directory.mkdir()
            return self._disk.create(place)

    def _due_part(self, stored: int) -> int | None:
        """Count bytes that were stored. Return the part to look at now, if there is one."""
        with self._lock:
            self._unseen_bytes += stored
            if self._unseen_bytes * OVERSHOOT <= self._part_bytes:
                return None
            self._unseen_bytes -= self._part_bytes // OVERSHOOT
            self._next_part = (self._next_part + 1) % self._parts
            return self._next_part

    def _trim(self, part: int) -> None:
        """Remove the least recently used files of a part that has more than its share, and some more."""
        goal = self._part_bytes - self._part_bytes // OVERSHOOT
        total, oldest = self._look_at(part)
        while total > self._part_bytes and oldest:
            for file in oldest:
                if total <= goal:
                    return
                self._evict(file.path)
                total -= file.size
            total, oldest = self._look_at(part)

    def _evict(self, path: Path) -> None:
        try:
            self._disk.remove(path)
        except FileNotFoundError:  # another process was faster
            return
        if path.parent.parent.name == _IMAGES:
            with self._lock:
                self.evicted += 1

    def _look_at(self, part: int) -> tuple[int, list[_File]]:
        """Return the size of a part and its least recently used files, the oldest first."""
        total = 0

        def files() -> Iterator[_File]:
            nonlocal total
            for file in self._files(part):
                total += file.size
                yield file

        oldest = nsmallest(MAX_EVICTED, files(), key=lambda file: file.used)
        return total, oldest

    def _files(self, part: int) -> Iterator[_File]:
        """Yield the files of a part, and remove what writers left that died."""
        count = _DIRECTORIES // self._parts
        for kind in (_IMAGES, _URLS):
            for number in range(part * count, (part + 1) * count):
                with suppress(FileNotFoundError), os.scandir(self._path / kind / f"{number:02x}") as entries:
                    for entry in entries:
                        if (file := self._examine(entry)) is not None:
                            yield file

    def _examine(self, entry: os.DirEntry[str]) -> _File | None:
        is_temporary = _TEMPORARY.fullmatch(entry.name)
        if not is_temporary and not _NAME.fullmatch(entry.name):
            return None
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not is_temporary:
            return _File(status.st_mtime, _size(status.st_size), Path(entry.path))
        if time.time() - status.st_mtime > TEMPORARY_SECONDS:
            self._disk.discard(Path(entry.path))
        return None


_ABSENT = {errno.ENOENT, errno.ESTALE}
"""Errors of a file that does not exist, or that another machine has removed."""


def _hash(text: str) -> str:
    return sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _size(length: int) -> int:
    """Return the bytes that a file of this length takes."""
    return -(-length // _BLOCK) * _BLOCK


def _touch(file: Path | int) -> None:
    """Record the use of a file, if that is possible: it may be another user's, or on a read-only disk."""
    with suppress(OSError):
        os.utime(file)
