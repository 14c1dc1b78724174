"""The interface of an output's storage, and its implementation for a directory on a disk.

`remote.py` implements it for an object store; `location.py` chooses between the two.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

from ..config.units import Shard
from ..errors import ResumeError
from ..storage.disk import Disk
from .run_file import RUN_FILE, RunFile
from .shard import ShardDirectory

_SHARD = re.compile(r"shard-(\d+)-of-(\d+)")


class Storage(ABC):
    """Where an output is stored: a directory on a disk, or a prefix on an object store."""

    path: Path
    """The directory on a disk for journals, locks and logs: of a local output, the output directory itself."""

    uploads_parts: bool
    """Whether a part is visible to other machines only after an upload."""

    @abstractmethod
    def __str__(self) -> str:
        """Return the location as it may be printed, without secrets."""

    @abstractmethod
    def make_path(self) -> Path:
        """Return `path`, creating a working directory that does not exist. Raises OptionError."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Return the contents of a small file. Raises OSError."""

    @abstractmethod
    def directories(self) -> Iterable[str]:
        """Return the names of the directories at the top of the output. Raises OSError."""

    @abstractmethod
    def shard(self, shard: Shard) -> ShardDirectory:
        """Return a shard's directory, whether it exists or not."""

    @abstractmethod
    def create_or_verify(self, run_file: RunFile, disk: Disk) -> None:
        """Create the output with this `run.json`, or check that the existing one matches.

        Raises:
            ResumeError: the output belongs to another run.
            OSError: the output cannot be written.
        """

    @abstractmethod
    def upload(self, path: Path, name: str) -> None:
        """Copy a file from below `path` into the output. A local output has it already. Raises OSError."""

    @abstractmethod
    def publish(self, path: Path, name: str) -> Path | str:
        """Move a finished file from `path` into the output and return its location. Raises StoppedEarly."""

    @abstractmethod
    def sibling(self, name: str) -> Path | None:
        """Return the path of a file next to the output, or None for an output that is not on a disk."""

    def run_file(self) -> RunFile:
        """Read `run.json`.

        Raises:
            ResumeError: it does not exist, is damaged, or has a later format.
            OSError: it cannot be read.
        """
        try:
            data = self.read(RUN_FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise ResumeError(f"{self}: not a batchvl output: no {RUN_FILE} found") from None
        return RunFile.decode(data, self)

    def shards(self, count: int | None = None) -> list[ShardDirectory]:
        """Return the existing shard directories in order. Raises OSError.

        Args:
            count: Only shards of a run with this many shards.
        """
        matches = (match for match in map(_SHARD.fullmatch, self.directories()) if match)
        shards = [Shard(int(match[1]), int(match[2])) for match in matches]
        chosen = [shard for shard in shards if count is None or shard.count == count]
        return [self.shard(shard) for shard in sorted(chosen, key=lambda shard: shard.index)]

    def _shard_path(self, shard: Shard) -> Path:
        return self.path / f"shard-{shard.index:05d}-of-{shard.count:05d}"


class LocalStorage(Storage):
    """An output directory on a disk."""

    uploads_parts = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def make_path(self) -> Path:
        return self.path

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def directories(self) -> Iterable[str]:
        return [path.name for path in self.path.iterdir()]

    def shard(self, shard: Shard) -> ShardDirectory:
        return ShardDirectory(self._shard_path(shard), shard)

    def create_or_verify(self, run_file: RunFile, disk: Disk) -> None:
        """Create the output or check that it matches. Of several concurrent first attempts, exactly one creates it."""
        disk.make_directory(self.path)
        path = self.path / RUN_FILE
        if not path.exists():
            try:
                disk.put_new(path, run_file.encode())
                return
            except FileExistsError:
                pass
        elif RunFile.is_torn(path.read_bytes()) and not any(self.path.glob("shard-*")):
            # Without hard links, a first attempt that dies can leave a part of the file.
            disk.put(path, run_file.encode())
        run_file.check_matches(self.run_file(), self)

    def upload(self, path: Path, name: str) -> None:
        pass

    def publish(self, path: Path, name: str) -> Path | str:
        return path

    def sibling(self, name: str) -> Path | None:
        return self.path.parent / name
