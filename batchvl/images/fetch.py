"""Fetching: the encoded bytes of a row's pictures, from the web and from the manifest itself, into the arena."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

import aiohttp
import tenacity

from .. import __version__
from ..config.options import FetchOptions
from ..errors import EmptyImage, FetchTimeout, TooLarge, TooManyBytes
from ..ipc.arena import Arena
from ..types import Extent, FileImage, ImageRef, InlineImage, WebImage
from .buffers import ImageBuffers
from .http import MAX_REDIRECTS, TransientError, check_scheme, check_status, failure
from .labels import source_label
from .messages import Source
from .network import NetworkGuard
from .timeout import PausableTimeout, pause_while_queued

__all__ = ["Fetched", "Fetcher", "check_given", "source_label"]

_HEADERS = {
    "User-Agent": f"batchvl/{__version__} (+offline batch inference)",
    "Accept": "image/*,*/*;q=0.5",
    "Accept-Encoding": "identity",  # pictures are compressed already
}
_LONGEST_BACKOFF = 30.0  # seconds
_DNS_SECONDS = 300


class _Overrun(Exception):
    """A picture is larger than the room reserved for it, though not than `--max-image-bytes`."""


@dataclass(frozen=True)
class Fetched:
    """Where a row's pictures are, in the row's order: files for the image worker to open, or bytes in the arena."""

    sources: tuple[Source, ...]
    _arena: Arena
    _extents: tuple[Extent, ...]

    def release(self) -> None:
        """Gives the arena's room back, once no worker reads it any more; exactly once."""
        self._arena.release(*self._extents)


@dataclass
class _Download:
    """One web picture of a row: `place` counts the row's pictures that are no files."""

    image: WebImage
    label: str
    room: ImageBuffers
    place: int
    alone: bool
    clock: PausableTimeout
    attempts: int = 0
    failed: TransientError | None = None
    """How the first attempt failed, until the retries have heard of it."""
    last: str = ""
    """Why it waited for another attempt, if it did."""


class Fetcher:
    """Fetches rows' pictures; an asynchronous context manager, for one event loop.

    arena: for encoded bytes only. backoff: seconds before the first retry, doubled for each one after it.

    Any number of rows may be fetched at once: connections are limited in all and per host, and nobody's clock runs
    while they queue for one, or for room in the arena.
    """

    def __init__(self, options: FetchOptions, arena: Arena, *, backoff: float = 0.5) -> None:
        self._options, self._arena = options, arena
        self._guard = NetworkGuard(options.allow_private)
        backoffs = tenacity.wait_exponential(backoff, _LONGEST_BACKOFF) + tenacity.wait_random(0, backoff)
        enough = tenacity.stop_after_attempt(options.fetch_retries + 1)
        self._again = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=lambda state: enough(state) or _too_late(state),
            wait=lambda state: max(backoffs(state), _passing(state).after),
            before_sleep=_rest,
            reraise=True,
        ).wraps(self._attempt_or_first_failure)

    async def __aenter__(self) -> Fetcher:
        silence = self._options.fetch_timeout / 4  # so that the deadline has room for another attempt
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._options.fetch_concurrency,
                limit_per_host=self._options.fetch_per_host,
                socket_factory=self._guard.socket,
                resolver=self._guard.resolver(),
                ttl_dns_cache=_DNS_SECONDS,
            ),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=silence, sock_read=silence),
            headers=_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,  # a proxy would connect where the guard cannot see
            trace_configs=[pause_while_queued()],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def fetch(self, images: Sequence[ImageRef]) -> Fetched:
        """A row's pictures. Files are left to the image workers.

        Raises the FetchError of the first picture that fails, or TooLarge where the row does not fit the arena; the
        row's other pictures are given up then, and nothing of it stays in the arena. So also when it is cancelled.
        """
        files = [image for image in images if isinstance(image, FileImage)]
        pictures = [image for image in images if not isinstance(image, FileImage)]
        if not pictures:
            return Fetched(tuple(Source(source_label(image), image) for image in files), self._arena, ())
        for image in pictures:
            check_given(image, self._options.max_image_bytes)
        room = ImageBuffers(self._arena, pictures, self._options.max_image_bytes)
        try:
            if not await self._download(room):
                room.widen()
                if not await self._download(room):
                    raise TooLarge(
                        f"the row's {len(pictures)} pictures have more bytes than the arena's {self._arena.size:,} "
                        "for encoded pictures: give it more with --arena-bytes, or fewer or smaller pictures"
                    )
        except BaseException:
            room.drop()
            raise
        extents = iter(room.extents)
        sources = tuple(
            Source(source_label(image), file=image)
            if isinstance(image, FileImage)
            else Source(source_label(image), extent=next(extents))
            for image in images
        )
        return Fetched(sources, self._arena, tuple(room.extents))

    async def _download(self, room: ImageBuffers) -> bool:
        """Fetches the row's web pictures; False where some of them overran their shares."""
        await room.hold()
        web = [(place, image) for place, image in enumerate(room.pictures) if isinstance(image, WebImage)]
        alone = len(web) == 1
        downloads = [
            _Download(image, source_label(image), room, place, alone, PausableTimeout(self._options.fetch_timeout))
            for place, image in web
        ]
        if alone:
            return await self._picture(downloads[0])
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._picture(download)) for download in downloads]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return all(task.result() for task in tasks)

    async def _picture(self, download: _Download) -> bool:
        try:
            async with download.clock.timeout:
                await self._persistently(download)
        except TimeoutError:
            seconds = f"{self._options.fetch_timeout:g} s"
            raise FetchTimeout(f"{download.label}: not complete within {seconds}{download.last}") from None
        except TransientError as passing:
            tried = f" (tried {download.attempts} times)" if download.attempts > 1 else ""
            raise type(passing.error)(f"{passing.error}{tried}") from passing.__cause__
        except _Overrun:
            return False
        return True

    async def _persistently(self, download: _Download) -> None:
        try:
            await self._attempt(download)
        except TransientError as passing:
            # Only now to tenacity: it takes as long as a third of a fetch, and nearly no fetch needs it.
            download.failed = passing
            await self._again(download)

    async def _attempt_or_first_failure(self, download: _Download) -> None:
        failed, download.failed = download.failed, None
        if failed is not None:
            raise failed
        await self._attempt(download)

    async def _attempt(self, download: _Download) -> None:
        """Raises a FetchError, Passing where another attempt may help, or _Overrun."""
        download.attempts += 1
        download.clock.go()  # an attempt that failed in the queue has left it stopped
        with download.clock.stopped():
            await download.room.hold()
        try:
            async with self._session.get(
                download.image.url.strip(), max_redirects=MAX_REDIRECTS + 1, trace_request_ctx=download.clock
            ) as response:
                check_status(response.status, response.headers, download.label)
                await self._receive(response, download)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise failure(error, download.label) from error

    async def _receive(self, response: aiohttp.ClientResponse, download: _Download) -> None:
        room, place, limit = download.room, download.place, self._options.max_image_bytes
        length = response.content_length
        if (length or 0) > limit:
            raise TooManyBytes(f"{download.label}: has {length:,} bytes, more than --max-image-bytes {limit:,}")
        encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
        if length is not None and not encoded and not room.expect(place, length):
            raise _Overrun
        view, end = room.view(place), 0
        async for chunk in response.content.iter_any():
            start, end = end, end + len(chunk)
            if end > limit:
                raise TooManyBytes(f"{download.label}: has more bytes than --max-image-bytes {limit:,}")
            if end > len(view):
                room.forget(place)
                raise _Overrun
            view[start:end] = chunk
        if not end:
            raise EmptyImage(f"{download.label}: has no bytes")
        room.expect(place, end)


def check_given(image: WebImage | InlineImage, limit: int) -> None:
    """What is wrong with a picture by what the manifest says of it; at most `limit` bytes are allowed.

    Raises UnsupportedSource, EmptyPicture or TooManyBytes.
    """
    if isinstance(image, WebImage):
        check_scheme(image)
    elif not image.data:
        raise EmptyImage(f"{source_label(image)}: has no bytes")
    elif len(image.data) > limit:
        found = f"has {len(image.data):,} bytes, more than --max-image-bytes {limit:,}"
        raise TooManyBytes(f"{source_label(image)}: {found}")


def _passing(state: tenacity.RetryCallState) -> TransientError:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, TransientError)
    return error


def _too_late(state: tenacity.RetryCallState) -> bool:
    download: _Download = state.args[0]
    return state.upcoming_sleep >= download.clock.left


def _rest(state: tenacity.RetryCallState) -> None:
    download: _Download = state.args[0]
    download.last = f"; the attempt before: {_passing(state)}"
    download.clock.go()
    if download.alone:
        download.room.drop()
