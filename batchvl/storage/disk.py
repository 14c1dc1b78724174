"""The file-system calls that results depend on, one method each, so that a test can fail or kill at any of them."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from ..errors import StoppedEarly

UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK})
"""Errors of file systems that do not support a call at all (a FUSE or SMB mount)."""

FAILING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT})
"""Errors of a disk that is full, fails or was disconnected: the run can resume once it is fixed."""


class Disk:
    """Real files. Every method raises OSError as the system does; a test's subclass may raise it as well."""

    def create(self, path: Path) -> int:
        """Create a file for writing and return its descriptor. Raises FileExistsError if it exists."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        """Write all the data, or raise after having written some."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Return once the file's bytes are on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close the file. Network file systems report some failed writes only here."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Move the file atomically, replacing an existing one."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """Create a hard link. Raises FileExistsError if the name is taken."""
        os.link(source, target)

    def remove(self, path: Path) -> None:
        """Remove the file."""
        os.unlink(path)

    def make_directory(self, path: Path) -> None:
        """Create the directory and its parents if needed; its name is on the disk on return."""
        if not path.is_dir():
            self.make_directory(path.parent)
            try:
                os.mkdir(path)
            except FileExistsError:
                if not path.is_dir():
                    raise
        self.sync_directory(path.parent)  # even if it existed: its creator may have died before this

    def sync_directory(self, path: Path) -> None:
        """Return once the directory's entries (names created, changed, removed) are on the disk.

        Returns without it on a read-only disk, and for a directory that may not be read.
        """
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            return
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in UNSUPPORTED | {errno.EROFS}:
                raise
        finally:
            os.close(fd)

    def put(self, path: Path, data: bytes) -> None:
        """Write a file with these contents, whole or not at all, replacing an existing one."""
        temporary = self._write_temporary(path, data)
        try:
            self.rename(temporary, path)
        except OSError:
            self.discard(temporary)
            raise
        self.sync_directory(path.parent)

    def put_new(self, path: Path, data: bytes) -> None:
        """Write a new file, whole or not at all. Raises FileExistsError if it exists: of several callers one wins."""
        temporary = self._write_temporary(path, data)
        try:
            self.link(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._write(path, data)  # no hard links here: still exclusive, but no longer whole or not at all
        finally:
            self.discard(temporary)
        self.sync_directory(path.parent)

    def discard(self, path: Path) -> None:
        """Remove a temporary file if possible; a leftover does no harm."""
        try:
            self.remove(path)
        except OSError:
            pass

    def _write_temporary(self, path: Path, data: bytes) -> Path:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            self._write(temporary, data)
        except OSError:
            self.discard(temporary)
            raise
        return temporary

    def _write(self, path: Path, data: bytes) -> None:
        fd = self.create(path)
        try:
            self.write(fd, data)
            self.sync(fd)
        finally:
            self.close(fd)


def as_stopped_early(location: object, error: OSError) -> StoppedEarly:
    """Return the run's error for an error of a disk or an object store."""
    if error.errno == errno.EREMOTEIO:  # of an object store; it names the object
        return StoppedEarly(
            f"{error.filename}: {error.strerror}. All rows reported as done are safe. Check the network and the "
            f"permissions, then run the same command again to resume"
        )
    name = errno.errorcode.get(error.errno or 0, "")
    advice = {"ENOSPC": "Free some space", "EDQUOT": "Free some of the quota"}.get(name, "Check the disk")
    return StoppedEarly(
        f"{location}: cannot be written: {error.strerror or error}{f' ({name})' if name else ''}. "
        f"All rows reported as done are safe. {advice}, then run the same command again to resume"
    )
