"""The client of all images that have a URL: of the web, of the Hugging Face Hub, and of object stores."""

from __future__ import annotations

from contextlib import AsyncExitStack
from types import TracebackType

from ..config.options import FetchOptions
from ..errors import FetchError
from ..types import WebImage
from .client import Visit
from .disk_cache import CACHE, READERS, DiskCache
from .host_headers import HostHeaders
from .hub import Hub
from .image_cache import ImageBuffer
from .object_urls import STORES, BucketGuard, parse_object_url
from .requester import LocalRequester, Requester
from .sources import named, source_label
from .urls import Target, parse_url

_BUCKET_FACTOR = 4
"""Concurrent requests to a bucket, for one to any other host: a bucket is many machines, and meant for this."""


class UrlParser:
    """Parses the URLs of images, and refuses buckets that a manifest may not have read.

    Args:
        guard: The buckets that are allowed.
    """

    def __init__(self, guard: BucketGuard) -> None:
        self._guard, self._hub = guard, Hub(guard)

    def parse(self, image: WebImage) -> Target:
        """Return where an image is requested. Errors have the name of the image.

        Raises:
            UnsupportedSource: The scheme is not one of URL_SCHEMES.
            InvalidUrl: The URL cannot be parsed.
            ForbiddenAddress: --allow-bucket does not allow the bucket.
        """
        try:
            return self._parse(image.url.strip())
        except FetchError as error:
            raise named(error, source_label(image)) from None

    def _parse(self, text: str) -> Target:
        scheme = text.partition("://")[0].lower()
        if scheme == "hf":
            return self._hub.target(text)
        if scheme not in STORES:
            return parse_url(text)
        target = parse_object_url(text)
        self._guard.check(target.origin)
        return target


class ImageClient:
    """Gets images from where their URLs say. An async context manager for one event loop.

    Args:
        options: Limits.
        requester: Requests what is not in the directory of --cache; by default, in this process.

    Raises:
        OptionError: An option, or the file of --host-headers, is not valid.
    """

    def __init__(self, options: FetchOptions, requester: Requester | None = None) -> None:
        if requester is None:
            requester = LocalRequester(options, HostHeaders.read(options.host_headers))
        self._requester = requester
        self._parser = UrlParser(BucketGuard(options.allow_bucket))
        self._per_host, self._host_rate = options.fetch_per_host, options.host_rate
        self._disk = None if options.cache is None else DiskCache(options, options.cache, requester.host_headers)

    async def __aenter__(self) -> ImageClient:
        async with AsyncExitStack() as stack:
            stack.push_async_exit(self._requester)
            await self._requester.__aenter__()
            if self._disk is not None:
                await self._disk.open()
                stack.push_async_callback(self._disk.close)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def parse(self, image: WebImage) -> Target:
        """Return where an image is requested. See `UrlParser.parse`."""
        return self._parser.parse(image)

    def start(self, target: Target) -> Visit:
        """Return where to look for an image first. It is in the directory of --cache, if `get` does not say otherwise.

        Objects of buckets are not kept: what their names mean depends on the environment, and they are fast to read.
        """
        if self._disk is None or target.scheme in STORES:
            return Visit(target)
        return Visit(target._replace(scheme=CACHE, origin=CACHE))

    def keep(self, target: Target, data: memoryview) -> None:
        """Keep an image in the directory of --cache."""
        if self._disk is not None:
            self._disk.store(target, data)

    def limits(self, origin: str) -> tuple[int, float | None]:
        """Return how many requests to a host, or to a bucket, may be in progress, and how many may start per second."""
        if origin == CACHE:
            return READERS, None
        return self._per_host * (_BUCKET_FACTOR if "://" in origin else 1), self._host_rate

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used."""
        await self._requester.check_proxy()

    async def get(self, visit: Visit, buffer: ImageBuffer, seconds: float, *, close: bool = False) -> Visit | None:
        """Request an image once. See `HttpClient.get`. Raises NotCached too."""
        if self._disk is not None and visit.target.scheme == CACHE:
            await self._disk.get(visit.target, buffer)
            return None
        return await self._requester.get(visit, buffer, seconds, close=close)
