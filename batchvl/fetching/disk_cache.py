"""Images kept on a disk, for the event loop: the directory of `--cache` behind threads, limits and patience.

Keeping images is a convenience: whatever goes wrong with the disk, rows get their images from the web, and the log has
one line about it.
"""

from __future__ import annotations

import asyncio
import json
import logging
from hashlib import sha256
from pathlib import Path

from ..concurrency import DaemonThreadExecutor
from ..config.options import FetchOptions
from ..config.units import pluralize
from ..errors import OptionError
from .cache_directory import CacheDirectory
from .host_headers import HostHeaders
from .image_cache import ImageBuffer
from .sniff import ends_early, is_image
from .urls import Target

logger = logging.getLogger(__name__)

CACHE = "cache:"
"""Scheme and origin of the visits to the directory; no URL has these."""
READERS = 16
"""Images that are looked up at the same time: a disk on a network takes many requests, each of which is slow."""
_WRITERS = 8
_MAX_PENDING_BYTES = 64 * 2**20
"""Bytes of images that wait to be written. Further ones are not kept, since a slow disk must not slow down the run."""
PATIENCE_SECONDS = 10.0
"""Time limit for a look-up, and for the last writes."""
_PAUSE_SECONDS = 60.0
"""Time for which a disk that failed is left alone."""


class NotCached(Exception):
    """The image is not there: fetch it."""


class DiskCache:
    """Looks for images in the directory, and keeps those that were fetched. For one event loop.

    Args:
        options: The directory and its limits.
        path: The directory.
        host_headers: Headers with which images are fetched.
    """

    def __init__(self, options: FetchOptions, path: str, host_headers: HostHeaders) -> None:
        if "://" in path:
            raise OptionError(f"--cache: expected a directory on a disk; found {path!r}")
        self._path, self._options = Path(path), options
        self._directory = CacheDirectory(self._path, options.cache_bytes, options.cache_age)
        self._scope = _scope(options, host_headers)
        self._stores: set[asyncio.Future[bool]] = set()
        self._pending_bytes = 0
        self._found = self._stored = self._skipped = 0
        self._paused_until: dict[str, float] = {}
        """When what failed is tried again: reading or writing."""

    async def open(self) -> None:
        """Create the directory. Raises OptionError if it cannot be used."""
        self._loop = asyncio.get_running_loop()
        try:
            await asyncio.to_thread(self._directory.open)
        except OSError as error:
            raise OptionError(f"--cache: {self._path} cannot be used: {error.strerror}") from None
        self._readers = DaemonThreadExecutor(READERS, "batchvl-cache-reader")
        self._writers = DaemonThreadExecutor(_WRITERS, "batchvl-cache-writer")
        age = self._options.cache_age
        logger.info(f"images are kept in {self._path}: up to {self._options.cache_bytes}, and used for {age}")

    async def close(self) -> None:
        """Complete the writes, if that does not take long, and say what the directory was good for."""
        if self._stores:
            await asyncio.wait(self._stores, timeout=PATIENCE_SECONDS)
        for threads in (self._readers, self._writers):
            threads.shutdown(wait=False, cancel_futures=True)
        counts = [f"{pluralize(self._found, 'image')} came from it", f"{self._stored:,} stored"]
        counts += [
            f"{number:,} {text}"
            for number, text in (
                (self._directory.evicted, "removed to keep its size"),
                (self._directory.damaged, "found damaged and removed"),
                (self._skipped + len(self._stores), "not stored, since the disk was too slow or failed"),
            )
            if number
        ]
        logger.info(f"{self._path}: {', '.join(counts)}")

    async def get(self, target: Target, buffer: ImageBuffer) -> None:
        """Read an image into the buffer. Raises NotCached, or NoRoom."""
        if self._is_paused("read"):
            raise NotCached
        key, limit = self._key(target), self._options.max_image_bytes
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                data = await self._loop.run_in_executor(self._readers, self._directory.find, key, limit)
        except OSError as error:  # TimeoutError is one
            self._pause("read", error)
            raise NotCached from None
        if not data:
            raise NotCached
        buffer.begin(len(data))
        buffer.write(data)
        self._found += 1

    def store(self, target: Target, data: memoryview) -> None:
        """Keep an image that was fetched, some time soon, unless the disk is behind. The bytes are copied."""
        if self._pending_bytes + len(data) > _MAX_PENDING_BYTES or self._is_paused("written"):
            self._skipped += 1
            return
        self._pending_bytes += len(data)
        store = self._loop.run_in_executor(self._writers, self._store, self._key(target), bytes(data))
        self._stores.add(store)
        store.add_done_callback(lambda _: self._end_store(store, len(data)))

    def _store(self, key: str, data: bytes) -> bool:
        """Store an image. Return False if it is none, or not whole: the next run had better ask its server again."""
        if not is_image(data) or ends_early(data):
            return False
        self._directory.store(key, data)
        return True

    def _end_store(self, store: asyncio.Future[bool], length: int) -> None:
        self._stores.discard(store)
        self._pending_bytes -= length
        if store.cancelled():
            return
        match store.exception():
            case None:
                self._stored += store.result()
            case OSError() as error:
                self._skipped += 1
                self._pause("written", error)
            case error:
                self._loop.call_exception_handler({"message": "an image was not stored", "exception": error})

    def _key(self, target: Target) -> str:
        return self._scope + target.key

    def _is_paused(self, what: str) -> bool:
        return self._loop.time() < self._paused_until.get(what, 0.0)

    def _pause(self, what: str, error: OSError) -> None:
        """Leave the disk alone for a while after a failure, of which only the first is worth a line."""
        if what not in self._paused_until:
            reason = error.strerror or f"no answer within {PATIENCE_SECONDS:g} s"
            logger.warning(f"--cache: {self._path} cannot be {what}: {reason}. The run goes on without it")
        self._paused_until[what] = self._loop.time() + _PAUSE_SECONDS


def _scope(options: FetchOptions, host_headers: HostHeaders) -> str:
    """Return a text that runs have in common which may fetch the same images.

    What a run fetched from a network that is not public, or with headers of its own, must not become the answer to a
    manifest that may not read it.
    """
    headers = json.dumps(host_headers.tables, sort_keys=True)
    return f"{sorted(options.allow_private)} {sorted(options.allow_host)} {sha256(headers.encode()).hexdigest()} "
