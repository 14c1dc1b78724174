"""An output on an object store: `-o s3://bucket/prefix`.

The layout is that of a directory (see `shard.py`), with these differences:

- A bucket has no fsync and no append. Journals, locks and logs are kept in a working directory on a disk of the machine
  that runs, one for each output (`--work`). A part is made there, uploaded whole and checked in the bucket; only then
  its journal is removed. The next attempt on a machine uploads what earlier attempts left in its working directory.
- Two machines cannot exclude each other, and pyarrow has no call that creates an object only if it does not exist.
  Therefore an attempt's number ends in five random digits: names stay unique, and later attempts have higher numbers.
- If two first attempts start concurrently, the later `run.json` remains. Each attempt checks before every upload that
  `run.json` is still its own, so results with another meaning are never mixed; they stay in the working directory.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import msgspec
import pyarrow as pa

from ..config.units import Shard
from ..errors import OptionError, ResumeError
from ..storage.disk import Disk, as_stopped_early
from ..storage.object_store import Bucket, RemoteError, map_concurrently
from ..storage.uploads import RETRY_SECONDS, Uploads
from . import parts
from .journal import Journal
from .lock import Holder
from .output import LocalStorage, Storage
from .parts import Part
from .run_file import RUN_FILE, RunFile
from .shard import JOURNAL, PART, FileStat, SegmentKey, ShardDirectory, parse_keys

SPAN = 100_000
"""Attempts that do not see each other draw their numbers from a range of this size."""
_NO_HOLDER = b"{}"


class RemoteStorage(Bucket, Storage):
    """An output's prefix in a bucket, and its working directory on this machine."""

    uploads_parts = True

    def __init__(self, uri: str, work: Path, retry_seconds: float = RETRY_SECONDS) -> None:
        """Make no connection yet.

        Args:
            uri: The prefix.
            work: The parent of all working directories.
            retry_seconds: For how long a failed upload is retried before the run stops.
        """
        super().__init__(uri)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(self))[-80:].strip("-")
        self.path = work / f"{name}-{blake2b(str(self).encode(), digest_size=4).hexdigest()}"
        self.uploads = Uploads(self.path, retry_seconds)
        self.check: Callable[[], None] = lambda: None
        """Called before a part is uploaded. Raises ResumeError if the prefix belongs to another run by now."""

    def create_or_verify(self, run_file: RunFile, disk: Disk) -> None:
        """Create the prefix and the working directory, or check that both belong to this run."""
        self.check = partial(self._create_or_verify_prefix, run_file)
        self.check()
        try:
            LocalStorage(self.path).create_or_verify(run_file, disk)
        except ResumeError as error:
            raise ResumeError(
                f"{error}, or remove {self.path}: it holds what another run with the same address did not upload"
            ) from None

    def _create_or_verify_prefix(self, run_file: RunFile) -> None:
        # Of several concurrent first attempts the last one creates the file; the others notice at their next check.
        existing = RunFile.decode(self.put_if_absent(RUN_FILE, run_file.encode()), self)
        run_file.check_matches(existing, self)

    def make_path(self) -> Path:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--work {self.path}: cannot be created: {error.strerror}") from error
        return self.path

    def publish(self, path: Path, name: str) -> Path | str:
        self.uploads.submit(partial(self.upload, path, name))
        self.uploads.wait()
        path.unlink()
        return f"{self}/{name}"

    def shard(self, shard: Shard) -> ShardDirectory:
        return RemoteShardDirectory(self._shard_path(shard), shard, self)

    def sibling(self, name: str) -> Path | None:
        return None


@contextmanager
def stop_on_remote_error() -> Iterator[None]:
    """Raise StoppedEarly for a RemoteError: the same command can resume once the store responds again."""
    try:
        yield
    except RemoteError as error:
        raise as_stopped_early(error.filename, error) from error


@dataclass(frozen=True)
class RemoteShardDirectory(ShardDirectory):
    """A shard's directory below the prefix, and its part of the working directory."""

    storage: RemoteStorage

    def local_names(self) -> Collection[str]:
        try:
            return super().local_names()
        except FileNotFoundError:  # no attempt has been made on this machine
            return []

    def names(self) -> Collection[str]:
        return self.storage.files(self.path.name)

    def read(self, name: str) -> bytes:
        return self.storage.read(self._object_name(name))

    def part_readers(
        self, keys: Iterable[SegmentKey], scratch: Path | None = None
    ) -> Iterator[tuple[SegmentKey, Callable[[], Part]]]:
        keys = list(keys)
        read = self._read_footer if scratch is None else partial(self._download, scratch)
        yield from zip(keys, map_concurrently(read, [self.part(key).name for key in keys]), strict=True)

    def files(self) -> dict[str, FileStat]:
        local = super().files() if self.path.is_dir() else {}
        return local | {name: FileStat(*stat) for name, stat in self.storage.files(self.path.name).items()}

    def holder(self) -> Holder | None:
        try:
            return msgspec.json.decode(self.read("lock"), type=Holder)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def next_attempt(self) -> int:
        return (self.last_attempt() // SPAN + 1) * SPAN + secrets.randbelow(SPAN)

    def put(self, name: str, data: bytes, disk: Disk) -> None:
        self.storage.uploads.submit(partial(self.storage.put, self._object_name(name), data))

    def put_new(self, name: str, data: bytes, disk: Disk) -> None:
        if self.storage.put_if_absent(self._object_name(name), data) != data:
            raise FileExistsError(self._object_name(name))

    def remove_journal(self, key: SegmentKey, disk: Disk) -> None:
        self.storage.uploads.submit(partial(self._upload_part, key, disk))

    def recover_local(self, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        names = self.local_names()
        journals, existing_parts = parse_keys(JOURNAL, names), parse_keys(PART, names)
        unconverted = journals - existing_parts
        described = {attempt.attempt: attempt.metadata for attempt in self.attempts()} if unconverted else {}
        for key in sorted(journals | existing_parts):
            if key not in existing_parts:
                journal = Journal.read(self.journal(key))
                if not any(True for _ in journal.entries()):
                    disk.remove(self.journal(key))
                    continue
                attempt_metadata = described.get(key[0])
                part_metadata = {**attempt_metadata, **metadata} if attempt_metadata else {}
                for _ in parts.write(journal, self.part(key), schema, part_metadata, disk):
                    pass
            self._upload_part(key, disk)

    def heartbeat(self, holder: Holder | None) -> None:
        if holder is None or self.storage.uploads.idle:
            data = _NO_HOLDER if holder is None else msgspec.json.encode(holder)
            self.storage.uploads.submit(partial(self.storage.put, self._object_name("lock"), data))

    def wait_for_uploads(self) -> None:
        self.storage.uploads.wait()

    def detach(self) -> None:
        self.storage.uploads.give_up()

    def delete_attempt(self, attempt: int) -> None:
        self.storage.remove(self._object_name(f"attempt-{attempt:04d}.json"))
        self.storage.remove(self._object_name("lock"))
        if not self.last_attempt() and set(self.storage.directories()) <= {self.path.name}:
            self.storage.remove(RUN_FILE)

    def _object_name(self, name: str) -> str:
        return f"{self.path.name}/{name}"

    def _read_footer(self, name: str) -> Part:
        return Part.read(f"{self.storage}/{self._object_name(name)}", self.storage.read_footer(self._object_name(name)))

    def _download(self, scratch: Path, name: str) -> Part:
        copy = scratch / f"{self.path.name}-{name}"
        self.storage.download(self._object_name(name), copy)
        return Part.read(copy)

    def _upload_part(self, key: SegmentKey, disk: Disk) -> None:
        """Upload a part, then remove it and its journal from the disk. Can be repeated after a failure."""
        part = self.part(key)
        self.storage.check()
        self.storage.upload(part, self._object_name(part.name))
        for path in (self.journal(key), part):
            with suppress(FileNotFoundError):
                disk.remove(path)
        disk.sync_directory(self.path)
