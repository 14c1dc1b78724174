"""A prefix of a bucket on an object store, through pyarrow.fs: where finished files can lie besides a disk."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs
import tenacity

from ..errors import OptionError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
READ_PATIENCE = 30.0
"""For how many seconds a read that fails is tried again, on top of what pyarrow tries itself (6 s)."""
_AT_ONCE = 16
"""Files read at once: each is a round trip or two."""
_PIECE = 32 * 2**20
_CHUNK = 8 * 2**20
_TAIL = 64 * 1024
"""What most footers fit into."""

T = TypeVar("T")


class RemoteError(OSError):
    """What an object store answered, or that it did not: no network, no permission, too many requests."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(errno.EREMOTEIO, reason, where)


_patiently = tenacity.retry(
    retry=tenacity.retry_if_exception_type(RemoteError), stop=tenacity.stop_after_delay(READ_PATIENCE),
    wait=tenacity.wait_random_exponential(0.5, 5), reraise=True,
)  # fmt: skip


class Bucket:
    """The files below a prefix, by their names there ("shard-00000-of-00001/complete.json").

    A file is there whole or not at all. Nothing is asked of the store before the first method is called. All methods
    raise RemoteError where the store cannot be reached or refuses, those that read only after a while; before that,
    OptionError where there is no such bucket or the address is none.
    """

    def __init__(self, uri: str) -> None:
        """uri: as `pyarrow.fs.FileSystem.from_uri` takes it. What is secret in it is never shown."""
        self._uri = uri

    def __str__(self) -> str:
        """The address without user, password and query."""
        return redact_uri(self._uri)

    def files(self, folder: str = "") -> dict[str, tuple[float, int]]:
        """The files in a folder: when they were written, in seconds since the epoch, and their bytes."""
        found = (entry for entry in self._entries(folder) if entry.type == pa.fs.FileType.File)
        # Empty ones are none of ours: marks for folders, and what some stores show of a file that is being uploaded.
        return {entry.base_name: ((entry.mtime_ns or 0) / 1e9, entry.size) for entry in found if entry.size}

    def folders(self) -> list[str]:
        """The folders directly below the prefix."""
        return [entry.base_name for entry in self._entries("") if entry.type == pa.fs.FileType.Directory]

    @_patiently
    def read(self, name: str) -> bytes:
        """A small file. Raises FileNotFoundError."""
        with self._asking(name), self._system.open_input_file(self._key(name)) as file:
            return bytes(file.read_at(file.size(), 0))

    @_patiently
    def footer(self, name: str) -> bytes:
        """A Parquet file's end, with all of its footer. Raises FileNotFoundError."""
        with self._asking(name), self._system.open_input_file(self._key(name)) as file:
            size = file.size()
            tail = bytes(file.read_at(min(size, _TAIL), max(0, size - _TAIL)))
            wanted = min(size, int.from_bytes(tail[-8:-4], "little") + 8)  # footer, its length, "PAR1"
            return tail if wanted <= len(tail) else bytes(file.read_at(wanted, size - wanted))

    @_patiently
    def download(self, name: str, path: Path) -> None:
        """Copies a file to a disk. Raises FileNotFoundError, and OSError where the disk fails."""
        with path.open("wb") as copy:
            with self._asking(name):
                file = self._system.open_input_file(self._key(name))
                size = file.size()
            with file:
                for start in range(0, size, _CHUNK):
                    with self._asking(name):
                        data = file.read_at(_CHUNK, start)
                    copy.write(data)

    def put(self, name: str, data: bytes | pa.Buffer) -> None:
        """Puts a file, over what is there."""
        whole = pa.py_buffer(data)
        with self._asking(name):
            stream = self._system.open_output_stream(self._key(name))
            try:
                for start in range(0, whole.size, _PIECE):
                    stream.write(whole.slice(start, min(_PIECE, whole.size - start)))
                    stream.flush()  # pyarrow uploads behind our back, and would copy all of a large file for it
            except BaseException:
                # It completes an upload whenever its stream is closed, at the latest when that is collected. Where a
                # piece has failed, that fails too; after an interrupt there would be the beginning of a file.
                with suppress(OSError, pa.ArrowException):
                    stream.close()
                    self._system.delete_file(self._key(name))
                raise
            stream.close()

    def put_first(self, name: str, data: bytes) -> bytes:
        """Puts a file unless there is one, and returns what is there then.

        No store can do this in one step through pyarrow: of two that do it within the same moment both may succeed,
        and the later one stays.
        """
        try:
            return self.read(name)
        except FileNotFoundError:
            self.put(name, data)
            return self.read(name)

    def upload(self, path: Path, name: str) -> None:
        """Puts a disk's file, over what is there, and looks whether all of it is. Raises OSError for the disk's."""
        with pa.memory_map(str(path)) as file:
            self.put(name, file.read_buffer())
        with self._asking(name):
            found = self._system.get_file_info(self._key(name))
        if found.size != path.stat().st_size:
            raise RemoteError(f"{self}/{name}", f"{found.size} bytes are there of {path.stat().st_size} uploaded")

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        try:
            with self._asking(name):
                self._system.delete_file(self._key(name))
        except FileNotFoundError:
            pass

    @_patiently
    def _entries(self, folder: str) -> list[pa.fs.FileInfo]:
        with self._asking(folder):
            selector = pa.fs.FileSelector(self._key(folder), allow_not_found=True)
            return list(self._system.get_file_info(selector))

    def _key(self, name: str) -> str:
        return f"{self._opened[1]}/{name}".rstrip("/")

    @property
    def _system(self) -> pa.fs.FileSystem:
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[pa.fs.FileSystem, str]:
        try:
            system, prefix = pa.fs.FileSystem.from_uri(self._uri)
            bucket = prefix.partition("/")[0]
            # A store lists nothing, and raises nothing, where the bucket is not there.
            if not bucket or system.get_file_info(bucket).type == pa.fs.FileType.NotFound:
                raise OptionError(f"{self}: there is no bucket {bucket!r}" if bucket else f"{self}: names no bucket")
        except (OSError, pa.ArrowException, ImportError) as error:
            raise OptionError(
                f"{self}: cannot be opened: {self._reason(error)}. Where it is and who asks is told by the address or "
                f"the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, …)"
            ) from None
        return system, prefix.rstrip("/")

    @contextmanager
    def _asking(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise RemoteError(f"{self}/{name}", self._reason(error)) from None

    def _reason(self, error: Exception) -> str:
        """What pyarrow said, on one line, without what the address has that is secret."""
        text = str(error).strip().partition("\n")[0].replace(self._uri, str(self))
        user = self._uri.partition("://")[2].rpartition("@")[0]
        for secret in filter(None, (user, *user.split(":"))):
            text = text.replace(secret, "…")
        return re.sub(r" \(Request ID: [^)]*\)", "", text)


def redact_uri(uri: str) -> str:
    """An address as it may be printed and written.

    >>> redact_uri("s3://KEY:SECRET@night/captions/?region=eu-west-1"), redact_uri("abfs://night:KEY@account.example/captions")
    ('s3://night/captions', 'abfs://night@account.example/captions')
    """
    scheme, _, rest = uri.partition("://")
    place, slash, path = rest.partition("?")[0].partition("/")
    if ":" in place and "@" not in place and "@" in path:  # a key with a slash, which should have been %2F
        place, slash, path = path.rpartition("@")[2].partition("/")
    user, at, host = place.rpartition("@")
    who = user.partition(":")[0] + at if scheme.startswith("abfs") else ""
    return f"{scheme}://{who}{host}{slash}{path}".rstrip("/")


def map_concurrently(call: Callable[[str], T], names: Iterable[str]) -> Iterator[Callable[[], T]]:
    """Calls something for each name, several at a time; for each, in order, what gives its result or raises."""
    with ThreadPoolExecutor(_AT_ONCE, "batchvl-remote") as pool:
        calls = [pool.submit(call, name) for name in names]
        try:
            for running in calls:
                yield running.result
        finally:
            for running in calls:
                running.cancel()
