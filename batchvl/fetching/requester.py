"""Requests for images: over HTTP, or to object stores."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType
from typing import Protocol

from ..config.options import FetchOptions
from .client import HttpClient, Visit
from .host_headers import HostHeaders
from .image_cache import ImageBuffer, Receiver
from .object_client import ObjectClient
from .object_urls import STORES


class Requester(Protocol):
    """Requests images, or has others do it. An async context manager for one event loop.

    Attributes:
        host_headers: Headers for certain hosts.
    """

    host_headers: HostHeaders

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used."""
        ...

    async def get(self, visit: Visit, buffer: ImageBuffer, seconds: float, *, close: bool = False) -> Visit | None:
        """Request an image once. See `HttpClient.get`."""
        ...


class LocalRequester:
    """The `Requester` that does it in this process.

    Args:
        options: Limits.
        host_headers: Headers for certain hosts.

    Raises:
        OptionError: An option is not valid.
    """

    def __init__(self, options: FetchOptions, host_headers: HostHeaders) -> None:
        self.host_headers = host_headers
        self._http, self._objects = HttpClient(options, host_headers), ObjectClient(options)

    async def __aenter__(self) -> LocalRequester:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._http)
            await stack.enter_async_context(self._objects)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used."""
        await self._http.check_proxy()

    async def get(self, visit: Visit, buffer: Receiver, seconds: float, *, close: bool = False) -> Visit | None:
        """Request an image once. See `HttpClient.get`."""
        if visit.target.scheme in STORES:
            await self._objects.get(visit, buffer, seconds)
            return None
        return await self._http.get(visit, buffer, seconds, close=close)
