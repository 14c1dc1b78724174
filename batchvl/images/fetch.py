"""Fetching the encoded images of a row, from the web and from the manifest itself, into the arena."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import aiohttp
import tenacity

from .._version import __version__
from ..config.options import FetchOptions
from ..errors import EmptyImage, FetchTimeout, TooLarge, TooManyBytes
from ..ipc.arena import Arena
from ..types import Extent, FileImage, ImageRef, WebImage
from .buffers import ImageBuffers
from .http import MAX_REDIRECTS, TransientError, check_status, classify
from .messages import Source
from .network import NetworkGuard
from .sources import check_given, source_label
from .timeout import PausableTimeout, pause_while_queued

_HEADERS = {
    "User-Agent": f"batchvl/{__version__} (+offline batch inference)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",  # images are compressed already
}
_MAX_BACKOFF_SECONDS = 30.0
_DNS_CACHE_SECONDS = 300


class _BufferTooSmall(Exception):
    """An image has more bytes than its buffer, though not more than --max-image-bytes."""


@dataclass(frozen=True)
class Fetched:
    """The images of a row, in the row's order: files for the image worker to open, or bytes in the arena."""

    sources: tuple[Source, ...]
    _arena: Arena
    _extents: tuple[Extent, ...]

    def release(self) -> None:
        """Release the space in the arena. Call exactly once, when no worker reads it any more."""
        self._arena.release(*self._extents)


@dataclass
class _Download:
    """One web image of a row."""

    image: WebImage
    label: str
    buffers: ImageBuffers
    index: int
    """Of the image in `buffers`."""
    is_only: bool
    """Whether the row has no other web image."""
    timeout: PausableTimeout
    attempts: int = 0
    first_error: TransientError | None = None
    """Error of the first attempt, for the retries to begin with."""
    note: str = ""
    """Why it waits for another attempt, for the message of a timeout."""


class Fetcher:
    """Fetches the images of rows. An async context manager for one event loop.

    Any number of rows may be fetched concurrently: the number of connections is limited in total and per host, and
    timeouts do not count the time in which a download waits for a connection or for space in the arena.

    Args:
        options: Limits.
        arena: Arena of encoded images.
        backoff: Seconds before the first retry, doubled for each further one.
    """

    def __init__(self, options: FetchOptions, arena: Arena, *, backoff: float = 0.5) -> None:
        self._options, self._arena = options, arena
        self._guard = NetworkGuard(options.allow_private)
        backoffs = tenacity.wait_exponential(backoff, _MAX_BACKOFF_SECONDS) + tenacity.wait_random(0, backoff)
        is_last = tenacity.stop_after_attempt(options.fetch_retries + 1)
        self._retry = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=lambda state: is_last(state) or _would_time_out(state),
            wait=lambda state: max(backoffs(state), _error(state).retry_after),
            before_sleep=_before_sleep,
            reraise=True,
        ).wraps(self._first_error_or_attempt)

    async def __aenter__(self) -> Fetcher:
        silence = self._options.fetch_timeout / 4  # leaves time for another attempt
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._options.fetch_concurrency,
                limit_per_host=self._options.fetch_per_host,
                socket_factory=self._guard.socket,
                resolver=self._guard.resolver(),
                ttl_dns_cache=_DNS_CACHE_SECONDS,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence),
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would connect where the guard cannot see it
            trace_configs=[pause_while_queued()],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, images: Sequence[ImageRef]) -> Fetched:
        """Fetch a row's images. Files are left to the image workers.

        If one image fails, or the call is cancelled, the others are given up and no space in the arena stays reserved.

        Raises:
            FetchError: The first image that fails.
            TooLarge: The row does not fit the arena.
        """
        files = [image for image in images if isinstance(image, FileImage)]
        others = [image for image in images if not isinstance(image, FileImage)]
        if not others:
            return Fetched(tuple(Source(source_label(image), image) for image in files), self._arena, ())
        for image in others:
            check_given(image, self._options.max_image_bytes)
        buffers = ImageBuffers(self._arena, others, self._options.max_image_bytes)
        try:
            if not await self._download_all(buffers):
                buffers.reallocate()
                if not await self._download_all(buffers):
                    raise TooLarge(
                        f"the row's {len(others)} images have more bytes than the arena's {self._arena.size:,} for "
                        "encoded images: set a larger --arena-bytes, or use fewer or smaller images"
                    )
        except BaseException:
            buffers.free()
            raise
        extents = iter(buffers.extents)
        sources = tuple(
            Source(source_label(image), file=image)
            if isinstance(image, FileImage)
            else Source(source_label(image), extent=next(extents))
            for image in images
        )
        return Fetched(sources, self._arena, tuple(buffers.extents))

    async def _download_all(self, buffers: ImageBuffers) -> bool:
        """Fetch a row's web images. Return False if a buffer was too small."""
        await buffers.allocate()
        web_images = [(index, image) for index, image in enumerate(buffers.images) if isinstance(image, WebImage)]
        is_only = len(web_images) == 1
        downloads = [
            _Download(image, source_label(image), buffers, index, is_only, PausableTimeout(self._options.fetch_timeout))
            for index, image in web_images
        ]
        if is_only:
            return await self._download(downloads[0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._download(download)) for download in downloads]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return all(task.result() for task in tasks)

    async def _download(self, download: _Download) -> bool:
        """Fetch one image within its timeout. Return False if its buffer was too small."""
        try:
            async with download.timeout.timeout:
                await self._attempt_with_retries(download)
        except TimeoutError:
            seconds = f"{self._options.fetch_timeout:g} s"
            raise FetchTimeout(f"{download.label}: not complete within {seconds}{download.note}") from None
        except TransientError as transient:
            attempts = f" (after {download.attempts} attempts)" if download.attempts > 1 else ""
            raise type(transient.error)(f"{transient.error}{attempts}") from transient.__cause__
        except _BufferTooSmall:
            return False
        return True

    async def _attempt_with_retries(self, download: _Download) -> None:
        try:
            await self._attempt(download)
        except TransientError as error:
            # tenacity takes a third of the time of a fetch, and hardly any fetch needs it: only from here on.
            download.first_error = error
            await self._retry(download)

    async def _first_error_or_attempt(self, download: _Download) -> None:
        error, download.first_error = download.first_error, None
        if error is not None:
            raise error
        await self._attempt(download)

    async def _attempt(self, download: _Download) -> None:
        """Fetch an image once.

        Raises:
            FetchError: The image cannot be fetched.
            TransientError: Another attempt may help.
            _BufferTooSmall: The buffer is too small.
        """
        download.attempts += 1
        download.timeout.resume()  # an attempt that failed while it waited for a connection has left it paused
        with download.timeout.paused():
            await download.buffers.allocate()
        try:
            async with self._session.get(
                download.image.url.strip(), max_redirects=MAX_REDIRECTS + 1, trace_request_ctx=download.timeout
            ) as response:
                check_status(response.status, response.headers, download.label)
                await self._receive(response, download)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise classify(error, download.label) from error

    async def _receive(self, response: aiohttp.ClientResponse, download: _Download) -> None:
        buffers, index, limit = download.buffers, download.index, self._options.max_image_bytes
        length = response.content_length
        if (length or 0) > limit:
            raise TooManyBytes(f"{download.label}: has {length:,} bytes, more than --max-image-bytes {limit:,}")
        is_encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        if length is not None and not is_encoded and not buffers.set_length(index, length):
            raise _BufferTooSmall
        view, end = buffers.view(index), 0
        async for chunk in response.content.iter_any():
            start, end = end, end + len(chunk)
            if end > limit:
                raise TooManyBytes(f"{download.label}: has more bytes than --max-image-bytes {limit:,}")
            if end > len(view):
                buffers.forget_length(index)
                raise _BufferTooSmall
            view[start:end] = chunk
        if not end:
            raise EmptyImage(f"{download.label}: has no bytes")
        buffers.set_length(index, end)


def _error(state: tenacity.RetryCallState) -> TransientError:
    """Return the error of the attempt that just failed. Retries happen only after a TransientError."""
    error = state.outcome.exception() if state.outcome is not None else None
    if not isinstance(error, TransientError):
        raise TypeError(f"a retry after {error!r}")
    return error


def _would_time_out(state: tenacity.RetryCallState) -> bool:
    download: _Download = state.args[0]
    return state.upcoming_sleep >= download.timeout.seconds_left


def _before_sleep(state: tenacity.RetryCallState) -> None:
    download: _Download = state.args[0]
    download.note = f"; previous attempt: {_error(state)}"
    download.timeout.resume()
    if download.is_only:
        download.buffers.free()
