"""The file-system calls that answers depend on, one method each, so that a test can fail or kill at any of them."""

from __future__ import annotations

import errno
import os
import secrets
from pathlib import Path

from ..errors import StoppedEarly

# What file systems say that cannot do a call at all (a FUSE or SMB mount), as opposed to a disk that fails.
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOLCK})

# What a disk says that is full, or fails, or went away: the run can go on once it is mended.
FAILING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT})


class Disk:
    """Real files. Every method raises OSError as the system does; a subclass may raise it for a test."""

    def create(self, path: Path) -> int:
        """A new file, open for writing; FileExistsError where there is one."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: bytes | bytearray | memoryview) -> None:
        """Writes all of it, or raises having written some."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def sync(self, fd: int) -> None:
        """Returns once the file's bytes are on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes the file; network file systems tell some failed writes only here."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Puts the file in its place, over what is there, in one step."""
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        """A second name for the file; FileExistsError where the name is taken."""
        os.link(source, target)

    def remove(self, path: Path) -> None:
        """Removes the file."""
        os.unlink(path)

    def make_folder(self, path: Path) -> None:
        """The folder and those above it, where they are not there yet; its name is on the disk on return."""
        if not path.is_dir():
            self.make_folder(path.parent)
            try:
                os.mkdir(path)
            except FileExistsError:
                if not path.is_dir():
                    raise
        self.sync_folder(path.parent)  # where it was there as well: whoever made it may have died before this

    def sync_folder(self, path: Path) -> None:
        """Returns once the folder's entries (names made, changed, removed) are on the disk.

        Where that cannot be had, it returns all the same: on a read-only disk, and of a folder that we may not read.
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
        """The file with these bytes, whole or not at all, over what is there."""
        temporary = self._temporary(path, data)
        try:
            self.rename(temporary, path)
        except OSError:
            self.discard(temporary)
            raise
        self.sync_folder(path.parent)

    def put_new(self, path: Path, data: bytes) -> None:
        """The same, but only where there is no such file yet: FileExistsError otherwise. Of many callers one wins."""
        temporary = self._temporary(path, data)
        try:
            self.link(temporary, path)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            self._write(path, data)  # no hard links here: still exclusive, though no longer whole or not at all
        finally:
            self.discard(temporary)
        self.sync_folder(path.parent)

    def discard(self, path: Path) -> None:
        """Removes a temporary file if that can be done: what remains of it does no harm."""
        try:
            self.remove(path)
        except OSError:
            pass

    def _temporary(self, path: Path, data: bytes) -> Path:
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


def as_stopped_early(where: object, error: OSError) -> StoppedEarly:
    """What a failing disk means for the run."""
    if error.errno == errno.EREMOTEIO:  # an object store's, which names the object
        return StoppedEarly(
            f"{error.filename}: {error.strerror}. All that was reported as done is kept: see to the network and the "
            f"permissions, and run the same command again to go on"
        )
    found = errno.errorcode.get(error.errno or 0, "")
    help = {"ENOSPC": "free some space", "EDQUOT": "free some of the quota"}.get(found, "see to the disk")
    return StoppedEarly(
        f"{where}: cannot be written: {error.strerror or error}{f' ({found})' if found else ''}. "
        f"All that was reported as done is kept: {help} and run the same command again to go on"
    )
