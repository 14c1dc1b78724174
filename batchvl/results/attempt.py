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
from .shard import AttemptFile, CompleteFile, ShardFolder


class Attempt:
    """An attempt at a shard: holds its lock and has a number of its own."""

    def __init__(
        self, folder: ShardFolder, *, retry: int, total: int | None, disk: Disk, codes: list[str] | None = None
    ) -> None:
        """Makes the folder, takes the lock, takes the next number. Raises ResumeError and OSError."""
        self.folder, self._disk, self._finished = folder, disk, False
        disk.make_folder(folder.path)
        self._lock = Lock(folder.path / "lock")
        try:
            self._file = self._claim(retry, total, codes)
        except BaseException:
            self._lock.release()
            raise
        self.number, self.retry = self._file.attempt, retry

    def _claim(self, retry: int, total: int | None, codes: list[str] | None) -> AttemptFile:
        me = Holder.me()
        versions = {"python": platform.python_version(), "pyarrow": pa.__version__, "msgspec": msgspec.__version__}
        while True:
            number = self.folder.next_attempt()
            file = AttemptFile(FORMAT, number, retry, me.host, me.pid, me.since, versions, total, codes)
            try:
                self.folder.put_new(_name(number), msgspec.json.encode(file), self._disk)
            except FileExistsError:
                continue  # somebody whom the lock does not keep out was faster
            return file

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Writes what the run says about itself into the attempt's file. Raises OSError."""
        self._file.metadata, self._file.up = dict(metadata), time.time()
        self._put(_name(self.number), self._file)

    def count(self, total: int) -> None:
        """Tells how many rows the manifest has, where that was not known at the start. Raises OSError."""
        if self._file.total != total:
            self._file.total = total
            self._put(_name(self.number), self._file)

    def end(self) -> None:
        """Tells that this attempt, a retry, has asked all that it was to ask. Raises OSError."""
        self._file.ended = True
        self._put(_name(self.number), self._file)

    def complete(self, total: int | None) -> None:
        """Tells that the shard's end was reached; total: the manifest's rows. Raises OSError."""
        self._put("complete.json", CompleteFile(FORMAT, total))

    def beat(self, total: int | None) -> None:
        """A sign of life; total: the manifest's rows, as well as they are known. Raises OSError."""
        holder = self._lock.beat(total)
        if not self._finished:  # one that was under way when the attempt ended must not tell of it as at work
            self.folder.beat(holder)

    def finish(self) -> None:
        """Returns once all that this attempt wrote is where it belongs, and known to be all. Raises StoppedEarly."""
        self._finished = True
        self.folder.beat(None)
        self.folder.wait()

    def release(self) -> None:
        """Lets the next one in."""
        self.folder.leave()
        self._lock.release()

    def _put(self, name: str, content: msgspec.Struct) -> None:
        self.folder.put(name, msgspec.json.encode(content), self._disk)


def _name(number: int) -> str:
    return f"attempt-{number:04d}.json"
