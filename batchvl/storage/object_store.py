"""A prefix of a bucket on an object store, accessed through pyarrow.fs."""

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
READ_RETRY_SECONDS = 30.0
"""For how long a failed read is retried, in addition to pyarrow's own retries (6 s)."""
MAX_CONCURRENCY = 16
"""Concurrent reads: each takes one or two round trips."""
UPLOAD_CHUNK_BYTES = 32 * 2**20
"""Bytes handed to pyarrow between two flushes of an upload."""
FOOTER_BYTES = 64 * 1024
"""Bytes of the first read of a footer; most footers fit."""
_DOWNLOAD_CHUNK_BYTES = 8 * 2**20

T = TypeVar("T")


class RemoteError(OSError):
    """An object store reported an error or did not respond: no network, no permission, too many requests."""

    def __init__(self, location: str, reason: str) -> None:
        super().__init__(errno.EREMOTEIO, reason, location)


_retry_reads = tenacity.retry(
    retry=tenacity.retry_if_exception_type(RemoteError),
    stop=tenacity.stop_after_delay(READ_RETRY_SECONDS),
    wait=tenacity.wait_random_exponential(0.5, 5),
    reraise=True,
)


class Bucket:
    """The files below a prefix, by their names relative to it ("shard-00000-of-00001/complete.json").

    A file exists whole or not at all. The first method call connects to the store; it raises OptionError if the bucket
    does not exist or the URI is invalid. All methods raise RemoteError if the store is unreachable or rejects the
    request; reads are retried for a while first.
    """

    def __init__(self, uri: str) -> None:
        """Make no connection yet.

        Args:
            uri: A URI for `pyarrow.fs.FileSystem.from_uri`. Secrets in it are never printed.
        """
        self._uri = uri

    def __str__(self) -> str:
        """Return the URI without user, password and query."""
        return redact_uri(self._uri)

    def files(self, directory: str = "") -> dict[str, tuple[float, int]]:
        """Return the files in a directory: their modification times in seconds since the epoch, and their sizes."""
        files = (entry for entry in self._entries(directory) if entry.type == pa.fs.FileType.File)
        # Skip empty files: directory markers, and what some stores list for a file that is being uploaded.
        return {entry.base_name: ((entry.mtime_ns or 0) / 1e9, entry.size) for entry in files if entry.size}

    def directories(self) -> list[str]:
        """Return the names of the directories directly below the prefix."""
        return [entry.base_name for entry in self._entries("") if entry.type == pa.fs.FileType.Directory]

    @_retry_reads
    def read(self, name: str) -> bytes:
        """Return the contents of a small file. Raises FileNotFoundError."""
        with self._remote_errors(name), self._system.open_input_file(self._key(name)) as file:
            return bytes(file.read_at(file.size(), 0))

    @_retry_reads
    def read_footer(self, name: str) -> bytes:
        """Return the end of a Parquet file, including its whole footer. Raises FileNotFoundError."""
        with self._remote_errors(name), self._system.open_input_file(self._key(name)) as file:
            size = file.size()
            tail = bytes(file.read_at(min(size, FOOTER_BYTES), max(0, size - FOOTER_BYTES)))
            footer = min(size, int.from_bytes(tail[-8:-4], "little") + 8)  # the footer, its length, "PAR1"
            return tail if footer <= len(tail) else bytes(file.read_at(footer, size - footer))

    @_retry_reads
    def download(self, name: str, path: Path) -> None:
        """Copy a file to a disk. Raises FileNotFoundError, and OSError if the disk fails."""
        with path.open("wb") as copy:
            with self._remote_errors(name):
                file = self._system.open_input_file(self._key(name))
                size = file.size()
            with file:
                for start in range(0, size, _DOWNLOAD_CHUNK_BYTES):
                    with self._remote_errors(name):
                        data = file.read_at(_DOWNLOAD_CHUNK_BYTES, start)
                    copy.write(data)

    def put(self, name: str, data: bytes | pa.Buffer) -> None:
        """Write a file, replacing an existing one."""
        buffer = pa.py_buffer(data)
        with self._remote_errors(name):
            stream = self._system.open_output_stream(self._key(name))
            try:
                for start in range(0, buffer.size, UPLOAD_CHUNK_BYTES):
                    stream.write(buffer.slice(start, min(UPLOAD_CHUNK_BYTES, buffer.size - start)))
                    stream.flush()  # pyarrow uploads in the background, and would buffer all of a large file
            except BaseException:
                # pyarrow completes an upload when its stream is closed, at the latest by garbage collection. After a
                # failed chunk that fails as well; after an interrupt it would leave the beginning of the file.
                with suppress(OSError, pa.ArrowException):
                    stream.close()
                    self._system.delete_file(self._key(name))
                raise
            stream.close()

    def put_if_absent(self, name: str, data: bytes) -> bytes:
        """Write a file unless it exists, and return its contents.

        pyarrow has no atomic call for this: of two concurrent callers both may succeed, and the later file remains.
        """
        try:
            return self.read(name)
        except FileNotFoundError:
            self.put(name, data)
            return self.read(name)

    def upload(self, path: Path, name: str) -> None:
        """Copy a file from a disk, replacing an existing one, and check its size. Raises OSError if the disk fails."""
        with pa.memory_map(str(path)) as file:
            self.put(name, file.read_buffer())
        with self._remote_errors(name):
            info = self._system.get_file_info(self._key(name))
        expected = path.stat().st_size
        if info.size != expected:
            raise RemoteError(f"{self}/{name}", f"incomplete upload: {info.size} of {expected} bytes found")

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        try:
            with self._remote_errors(name):
                self._system.delete_file(self._key(name))
        except FileNotFoundError:
            pass

    @_retry_reads
    def _entries(self, directory: str) -> list[pa.fs.FileInfo]:
        with self._remote_errors(directory):
            selector = pa.fs.FileSelector(self._key(directory), allow_not_found=True)
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
            # Listing a bucket that does not exist returns nothing and raises nothing.
            if not bucket or system.get_file_info(bucket).type == pa.fs.FileType.NotFound:
                raise OptionError(f"{self}: bucket {bucket!r} does not exist" if bucket else f"{self}: no bucket given")
        except (OSError, pa.ArrowException, ImportError) as error:
            raise OptionError(
                f"{self}: cannot be opened: {self._reason(error)}. Set endpoint and credentials in the URI or the "
                f"environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE, …)"
            ) from None
        return system, prefix.rstrip("/")

    @contextmanager
    def _remote_errors(self, name: str) -> Iterator[None]:
        """Raise RemoteError for pyarrow's errors."""
        try:
            yield
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise RemoteError(f"{self}/{name}", self._reason(error)) from None

    def _reason(self, error: Exception) -> str:
        """Return pyarrow's message on one line, without the secrets in the URI."""
        text = str(error).strip().partition("\n")[0].replace(self._uri, str(self))
        user = self._uri.partition("://")[2].rpartition("@")[0]
        for secret in filter(None, (user, *user.split(":"))):
            text = text.replace(secret, "…")
        return re.sub(r" \(Request ID: [^)]*\)", "", text)


def redact_uri(uri: str) -> str:
    """Return a URI without its secrets.

    >>> redact_uri("s3://KEY:SECRET@night/captions/?region=eu-west-1"), redact_uri("abfs://night:KEY@account.example/captions")
    ('s3://night/captions', 'abfs://night@account.example/captions')
    """
    scheme, _, rest = uri.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("/")
    if ":" in authority and "@" not in authority and "@" in path:  # a key with a slash, which should have been %2F
        authority, slash, path = path.rpartition("@")[2].partition("/")
    user, at, host = authority.rpartition("@")
    container = user.partition(":")[0] + at if scheme.startswith("abfs") else ""
    return f"{scheme}://{container}{host}{slash}{path}".rstrip("/")


def map_concurrently(call: Callable[[str], T], names: Iterable[str]) -> Iterator[Callable[[], T]]:
    """Call a function for each name in threads; yield, in order, functions that return a call's result or raise."""
    with ThreadPoolExecutor(MAX_CONCURRENCY, "batchvl-remote") as pool:
        calls = [pool.submit(call, name) for name in names]
        try:
            for running in calls:
                yield running.result
        finally:
            for running in calls:
                running.cancel()
