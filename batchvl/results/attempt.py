"""One attempt at a shard."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping

import msgspec
import pyarrow as pa

from ..storage.disk import Disk
from .journal import FORMAT
from .lock import Holder, Lock
from .shard import AttemptFile, CompleteFile, ShardDirectory


class Attempt:
    """An attempt at a shard: holds the shard's lock and has a number of its own."""

    def __init__(
        self, directory: ShardDirectory, *, retry: int, total: int | None, disk: Disk, codes: list[str] | None = None
    ) -> None:
        """Create the directory, take the lock and the next number.

        Args:
            directory: The shard's directory.
            retry: The 1-based number of the retry, 0 in a run.
            total: Number of rows in the manifest, if known.
            disk: Writes the files.
            codes: Error codes that the retry selects.

        Raises:
            ResumeError: another runner holds the lock.
            OSError: a file cannot be written.
        """
        self.directory, self._disk, self._finished = directory, disk, False
        disk.make_directory(directory.path)
        self._lock = Lock(directory.path / "lock")
        try:
            self._file = self._create_file(retry, total, codes)
        except BaseException:
            self._lock.release()
            raise
        self.number, self.retry = self._file.attempt, retry

    def _create_file(self, retry: int, total: int | None, codes: list[str] | None) -> AttemptFile:
        me = Holder.me()
        versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "msgspec": msgspec.__version__}
        while True:
            number = self.directory.next_attempt()
            file = AttemptFile(FORMAT, number, retry, me.host, me.pid, me.since, versions, total, codes)
            try:
                self.directory.put_new(_name(number), msgspec.json.encode(file), self._disk)
            except FileExistsError:
                continue  # an attempt that the lock does not exclude was faster
            return file

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Write the run's metadata to the attempt's file. Raises OSError."""
        self._file.metadata, self._file.up = dict(metadata), time.time()
        self._put(_name(self.number), self._file)

    def set_total(self, total: int) -> None:
        """Record the number of rows in the manifest, if it was not known at the start. Raises OSError."""
        if self._file.total != total:
            self._file.total = total
            self._put(_name(self.number), self._file)

    def mark_retry_ended(self) -> None:
        """Record that this retry has asked all its rows. Raises OSError."""
        self._file.ended = True
        self._put(_name(self.number), self._file)

    def mark_complete(self, total: int | None) -> None:
        """Record that the end of the shard was reached. Raises OSError.

        Args:
            total: Number of rows in the manifest.
        """
        self._put("complete.json", CompleteFile(FORMAT, total))

    def heartbeat(self, total: int | None) -> None:
        """Show that the attempt is alive. Raises OSError.

        Args:
            total: Number of rows in the manifest, possibly estimated.
        """
        holder = self._lock.heartbeat(total)
        if not self._finished:  # a late heartbeat must not show an attempt that has ended as active
            self.directory.heartbeat(holder)

    def finish(self) -> None:
        """Return once all files of this attempt are in the output. Raises StoppedEarly."""
        self._finished = True
        self.directory.heartbeat(None)
        self.directory.wait_for_uploads()

    def release(self) -> None:
        """Release the lock for the next attempt."""
        self.directory.detach()
        self._lock.release()

    def _put(self, name: str, content: msgspec.Struct) -> None:
        self.directory.put(name, msgspec.json.encode(content), self._disk)


def _name(number: int) -> str:
    return f"attempt-{number:04d}.json"
