"""Reads of objects from buckets into the buffers of images."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING

from cachetools import LRUCache
from obstore.exceptions import BaseError

from ..config.options import FetchOptions
from ..errors import ConnectionFailed, EmptyImage, InvalidUrl
from .client import MAX_CONNECT_SECONDS, MIN_BYTES_PER_SECOND, STALL_SECONDS, Visit, check_length, timed_out
from .http import TransientError
from .image_cache import Receiver
from .object_errors import classify_store
from .object_stores import ObjectStore, open_store
from .urls import Target

if TYPE_CHECKING:
    from obstore import GetResult

_MAX_STORES = 256
_LINGER_SECONDS = 0.1
"""For how long a thread of obstore may still need the interpreter after its last read."""


class ObjectClient:
    """Reads objects. An async context manager for one event loop."""

    def __init__(self, options: FetchOptions) -> None:
        self._max_bytes, self._seconds = options.max_image_bytes, float(options.fetch_timeout)
        self._stall_seconds = min(STALL_SECONDS, self._seconds / 2)
        self._chunk_bytes = int(self._stall_seconds * MIN_BYTES_PER_SECOND)
        self._connect_seconds = min(MAX_CONNECT_SECONDS, self._seconds / 3)
        self._stores: LRUCache[str, asyncio.Task[ObjectStore]] = LRUCache(_MAX_STORES)

    async def __aenter__(self) -> ObjectClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stores:
            # Python before 3.14 aborts if it ends while such a thread waits for it.
            await asyncio.sleep(_LINGER_SECONDS)

    async def get(self, visit: Visit, buffer: Receiver, seconds: float) -> None:
        """Read an object once, within --fetch-timeout.

        Args:
            visit: Where.
            buffer: Where its bytes go.
            seconds: Time limit, besides --fetch-timeout.

        Raises:
            FetchError: The object cannot be read.
            TransientError: Another attempt may help.
            NoRoom: There is no room for the image.
        """
        target, seconds = visit.target, min(seconds, self._seconds)
        credentials = "those of the environment"
        deadline = asyncio.get_running_loop().time() + seconds
        body_started = False
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                objects, credentials = await self._store(target)
                result = await objects.get_async(target.target[1:])
                body_started = True
                await self._receive(result, buffer, timeout, deadline)
        except TimeoutError:
            raise timed_out(seconds, body_started=body_started) from None
        except (BaseError, OSError) as error:
            raise classify_store(error, credentials) from None
        except ValueError:
            raise InvalidUrl("the store's client cannot request this key") from None

    async def _receive(self, result: GetResult, buffer: Receiver, timeout: asyncio.Timeout, deadline: float) -> None:
        """Receive an object. `timeout` expires early if it is too slow."""
        size, loop = result.meta["size"], asyncio.get_running_loop()
        check_length(size, self._max_bytes)
        if not size:
            raise EmptyImage("has no bytes")
        await buffer.open(size)
        timeout.reschedule(min(deadline, loop.time() + self._stall_seconds))
        async for chunk in result.stream(min_chunk_size=self._chunk_bytes):
            buffer.write(memoryview(chunk))
            timeout.reschedule(min(deadline, loop.time() + self._stall_seconds))
        if buffer.length < size:
            raise TransientError(ConnectionFailed(f"the object ended after {buffer.length:,} of {size:,} bytes"))

    async def _store(self, target: Target) -> ObjectStore:
        """Return the store of a target, which opens unless it is open, or failed to."""
        store = self._stores.get(target.origin)
        if store is None or (store.done() and (store.cancelled() or store.exception() is not None)):
            opening = asyncio.to_thread(open_store, target.scheme, target.host, self._connect_seconds)
            store = self._stores[target.origin] = asyncio.create_task(opening)
            store.add_done_callback(lambda task: task.cancelled() or task.exception())  # perhaps nobody waits any more
        return await asyncio.shield(store)
