"""Images in files and in members of tar archives (`ARCHIVE.tar#MEMBER`), as an image worker reads them."""

from __future__ import annotations

import os
import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from cachetools import LRUCache

from ..errors import EmptyImage, MissingFile, TooManyBytes
from ..storage.tar import Member, TarError, TarHeaders
from ..types import FileImage
from .files import check_beneath, open_beneath, pinned

MAX_MEMBERS = 2**21
"""Members of an archive that can be found by their names, and of all archives whose indexes are kept (32 MiB)."""
_INDEX_COST = 64
"""Members that an index counts for at least: there may be many small archives."""
_MEMBER = re.compile(r"\.(?:tar|tgz|tar\.(?:gz|bz2|xz|zst))#", re.IGNORECASE)


class ImageFiles:
    """Reads and checks images below the roots. Keeps indexes of the archives used last.

    A path with `.tar#` leads into an archive: what follows is the exact name of a member. If there is a file of that
    whole name it is meant instead. Of members with the same name, the last counts, as for tar. Nothing is extracted,
    so names in archives are only names: neither `..` nor a link leads anywhere.

    Args:
        roots: Directories that files and archives may lie in. Relative paths start from the first.
        max_bytes: Largest size of an image.
    """

    def __init__(self, roots: Sequence[Path], max_bytes: int) -> None:
        self._roots, self._max_bytes = roots, max_bytes
        self._indexes: LRUCache[tuple[int, ...], TarIndex] = LRUCache(
            MAX_MEMBERS + _INDEX_COST, getsizeof=lambda index: len(index) + _INDEX_COST
        )
        self._lock = Lock()

    def read(self, image: FileImage) -> bytes:
        """Return the bytes of an image.

        Raises:
            MissingFile, ForbiddenPath, TooManyBytes, EmptyImage: The image cannot be used.
        """
        if (parts := self._archive_and_member(image)) is None:
            return open_beneath(image.path, self._roots, self._max_bytes)
        with self._member(image, *parts) as (fd, member):
            data = b""
            while len(data) < member.size and (more := os.pread(fd, member.size - len(data), member.start + len(data))):
                data = data + more if data else more
            if len(data) < member.size:
                raise MissingFile(f"{image.path}: the archive has become shorter")
            return data

    def check(self, image: FileImage) -> None:
        """Raise what `read` would raise, as far as that is known without reading contents."""
        if (parts := self._archive_and_member(image)) is None:
            check_beneath(image.path, self._roots, self._max_bytes)
            return
        with self._member(image, *parts):
            pass

    def _archive_and_member(self, image: FileImage) -> tuple[str, str] | None:
        """Return the path of the image's archive and the name of its member; None if it is in a file of its own."""
        found = _MEMBER.search(image.path)
        if found is None or "\0" in image.path:
            return None
        if image.header is None and os.path.lexists(os.path.join(self._roots[0], image.path)):
            return None
        return image.path[: found.end() - 1], image.path[found.end() :]

    @contextmanager
    def _member(self, image: FileImage, archive: str, name: str) -> Iterator[tuple[int, Member]]:
        """Yield an open archive and a member of it that is an image by all that its header says."""
        with pinned(archive, self._roots) as (pin, size):
            fd = os.open(pin, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if image.header is None:
                    member = self._find(fd, size, name, archive)
                elif (at_header := _member_at(fd, size, image.header, name)) is not None:
                    member = at_header
                else:
                    raise MissingFile(f"{image.path}: the archive has changed since the manifest was read")
                if member.kind != "file":
                    raise MissingFile(f"{image.path}: is a {member.kind} in the archive, expected a file")
                if not member.size:
                    raise EmptyImage(f"{image.path}: has no bytes")
                if member.size > self._max_bytes:
                    found = f"has {member.size:,} bytes, more than --max-image-bytes {self._max_bytes:,}"
                    raise TooManyBytes(f"{image.path}: {found}")
                yield fd, member
            finally:
                os.close(fd)

    def _find(self, fd: int, size: int, name: str, archive: str) -> Member:
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino, size, status.st_mtime_ns
        with self._lock:
            if (index := self._indexes.get(key)) is None:
                index = self._indexes[key] = TarIndex(fd, size)
        if (member := index.find(fd, name)) is not None:
            return member
        damage = f"; the archive {index.damage}" if index.damage else ""
        raise MissingFile(f"{archive}: has no member {name!r:.200}{damage}")


class TarIndex:
    """Where the members of an archive are, by hashes of their names: 16 bytes for each.

    A damaged archive has the members before the damage.

    Args:
        fd: The open archive.
        size: Bytes of the archive.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.damage = ""
        """What is wrong with the archive, if anything."""
        self._size = size
        hashes, headers = array("q"), array("q")
        try:
            for member in TarHeaders(fd, size).members():
                if len(hashes) == MAX_MEMBERS:
                    self.damage = f"has more than {MAX_MEMBERS:,} members, and others cannot be found by name"
                    break
                hashes.append(hash(member.name))
                headers.append(member.header)
        except TarError as error:
            self.damage = str(error)
        order = sorted(range(len(hashes)), key=hashes.__getitem__)
        self._hashes = array("q", [hashes[at] for at in order])
        self._headers = array("q", [headers[at] for at in order])

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, fd: int, name: str) -> Member | None:
        """Return the last member of a name; None if there is none."""
        key = hash(name)
        first, last = bisect_left(self._hashes, key), bisect_right(self._hashes, key)
        for at in reversed(range(first, last)):  # sorting is stable: the last in the archive is the last here
            if (member := _member_at(fd, self._size, self._headers[at], name)) is not None:
                return member
        return None


def _member_at(fd: int, size: int, header: int, name: str) -> Member | None:
    """Return the member whose first header is at an offset; None if it is not that of this name any more."""
    try:
        member = next(TarHeaders(fd, size).members(header), None)
    except TarError:  # somebody writes to the archive
        return None
    return member if member is not None and member.name == name else None
