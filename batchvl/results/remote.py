"""An output on an object store: `-o s3://bucket/prefix`.

The layout is a folder's (see `shard.py`), with these differences:

- A bucket has no fsync and no append. Journals, locks and logs lie in a working folder on a disk of the machine that
  runs, one for each output (`--work`). A part is made there, uploaded whole, and looked at in the bucket; only then its
  journal goes. What attempts that have ended left in the working folder is brought in by the next one on the machine.
- Two machines cannot exclude each other, and pyarrow has no call that makes an object only where there is none. So an
  attempt's number ends in five digits drawn at random: names stay unique, and higher numbers are later attempts.
- Of two first attempts at once the later `run.json` stays. Whether it is still one's own is seen to again before each
  part is uploaded, so that answers of another meaning never get in; what they were is kept in the working folder.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import msgspec
import pyarrow as pa

from ..config.units import Shard
from ..errors import OptionError, ResumeError
from ..storage import uploads
from ..storage.disk import Disk, as_stopped_early
from ..storage.object_store import Bucket, RemoteError, map_concurrently
from . import parts
from .journal import Journal
from .lock import Holder
from .parts import Part
from .run_file import RUN_FILE, RunFile
from .shard import JOURNAL, PART, FileStat, Key, ShardFolder, keys

SPAN = 100_000
"""How far the numbers of attempts that do not see each other are drawn from."""
_NOBODY = b"{}"


class Remote(Bucket):
    """An output's prefix in a bucket, and its working folder on this machine."""

    def __init__(self, uri: str, work: Path) -> None:
        """work: the folder for working folders."""
        super().__init__(uri)
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", str(self))[-80:].strip("-")
        self.path = work / f"{name}-{blake2b(str(self).encode(), digest_size=4).hexdigest()}"
        self.uploads = uploads.Uploads(self.path, uploads.PATIENCE)
        self.check: Callable[[], None] = lambda: None
        """Called before a part is uploaded: raises ResumeError where the prefix has become another run's."""

    def claim(self, guard: RunFile, disk: Disk) -> None:
        """Makes the prefix and the working folder the guard's run's, or finds that they are.

        Raises ResumeError where one of them is another run's, OSError and OptionError.
        """
        self.check = partial(guard.claim_prefix, self)
        self.check()
        try:
            guard.claim(self.path, disk)
        except ResumeError as error:
            raise ResumeError(
                f"{error}, or remove {self.path}: it has what the other run, which had the same address, did not upload"
            ) from None

    def here(self) -> Path:
        """The working folder, made if it is not there. Raises OptionError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--work {self.path}: cannot be made: {error.strerror}") from error
        return self.path

    def send(self, path: Path, name: str) -> str:
        """Moves a finished file from the working folder below the prefix; its address. Raises StoppedEarly."""
        self.uploads.submit(partial(self.upload, path, name))
        self.uploads.wait()
        path.unlink()
        return f"{self}/{name}"

    def shard(self, path: Path, shard: Shard) -> ShardFolder:
        """The shard's folder below the prefix; path: its part of the working folder."""
        return RemoteShard(path, shard, self)


@contextmanager
def answering() -> Iterator[None]:
    """Makes StoppedEarly of what an object store refuses, for who goes on as soon as it answers again."""
    try:
        yield
    except RemoteError as error:
        raise as_stopped_early(error.filename, error) from error


@dataclass(frozen=True)
class RemoteShard(ShardFolder):
    """A shard's folder below the prefix, and its part of the working folder."""

    out: Remote

    def here(self) -> Iterable[str]:
        try:
            return super().here()
        except FileNotFoundError:  # no attempt has been made on this machine
            return []

    def names(self) -> Iterable[str]:
        return self.out.files(self.path.name)

    def read(self, name: str) -> bytes:
        return self.out.read(self._named(name))

    def reading(self, keys: Iterable[Key], scratch: Path | None = None) -> Iterator[tuple[Key, Callable[[], Part]]]:
        keys = list(keys)
        read = self._footer if scratch is None else partial(self._copy, scratch)
        yield from zip(keys, map_concurrently(read, [self.part(key).name for key in keys]), strict=True)

    def files(self) -> dict[str, FileStat]:
        found = super().files() if self.path.is_dir() else {}
        return found | {name: FileStat(*stamp) for name, stamp in self.out.files(self.path.name).items()}

    def holder(self) -> Holder | None:
        try:
            return msgspec.json.decode(self.read("lock"), type=Holder)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def next_attempt(self) -> int:
        return (self.last_attempt() // SPAN + 1) * SPAN + secrets.randbelow(SPAN)

    def put(self, name: str, data: bytes, disk: Disk) -> None:
        self.out.uploads.submit(partial(self.out.put, self._named(name), data))

    def put_new(self, name: str, data: bytes, disk: Disk) -> None:
        if self.out.put_first(self._named(name), data) != data:
            raise FileExistsError(self._named(name))

    def settle(self, key: Key, disk: Disk) -> None:
        self.out.uploads.submit(partial(self._bring, key, disk))

    def rescue(self, schema: pa.Schema, metadata: Mapping[str, str], disk: Disk) -> None:
        here = self.here()
        journals, made = keys(JOURNAL, here), keys(PART, here)
        told = {attempt.attempt: attempt.metadata for attempt in self.attempts()} if journals - made else {}
        for key in sorted(journals | made):
            if key not in made:
                journal = Journal.read(self.journal(key))
                if not any(True for _ in journal.entries()):
                    disk.remove(self.journal(key))
                    continue
                about = {**told[key[0]], **metadata} if told.get(key[0]) else {}
                for _ in parts.write(journal, self.part(key), schema, about, disk):
                    pass
            self._bring(key, disk)

    def beat(self, holder: Holder | None) -> None:
        if holder is None or self.out.uploads.idle:
            data = _NOBODY if holder is None else msgspec.json.encode(holder)
            self.out.uploads.submit(partial(self.out.put, self._named("lock"), data))

    def wait(self) -> None:
        self.out.uploads.wait()

    def leave(self) -> None:
        self.out.uploads.give_up()

    def forget(self, attempt: int) -> None:
        self.out.remove(self._named(f"attempt-{attempt:04d}.json"))
        self.out.remove(self._named("lock"))
        if not self.last_attempt() and set(self.out.folders()) <= {self.path.name}:
            self.out.remove(RUN_FILE)

    def _named(self, name: str) -> str:
        return f"{self.path.name}/{name}"

    def _footer(self, name: str) -> Part:
        return Part.read(f"{self.out}/{self._named(name)}", self.out.footer(self._named(name)))

    def _copy(self, scratch: Path, name: str) -> Part:
        copy = scratch / f"{self.path.name}-{name}"
        self.out.download(self._named(name), copy)
        return Part.read(copy)

    def _bring(self, key: Key, disk: Disk) -> None:
        """Uploads a part and removes what it was made of. May be done again after a failure."""
        part = self.part(key)
        self.out.check()
        self.out.upload(part, self._named(part.name))
        for path in (self.journal(key), part):
            with suppress(FileNotFoundError):
                disk.remove(path)
        disk.sync_folder(self.path)
