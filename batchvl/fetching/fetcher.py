"""The fetcher: what rows wait for. Each URL is downloaded once for all rows that want it.

Since a row keeps the images that it has while it waits for the others, rows with several images could fill the arena
and wait for each other for ever. When nothing else is in progress, the youngest of them gives up its images to those
who need room, and asks for them again once it has the others, so the oldest always gets on. Inline images take room
last, when all images of the web are there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from cachetools import TTLCache

from ..config.options import FetchOptions
from ..errors import RowError, TooLarge
from ..ipc.arena import Arena
from ..types import ImageRef, InlineImage, WebImage
from .dispatcher import FIRST_BACKOFF_SECONDS, Dispatcher, Outcome
from .download import Download, Fetch, Fetched, SetAside, copy_inline, gather
from .image_cache import CachedImage, ImageCache
from .image_client import ImageClient
from .requester import Requester
from .sources import check_inline, source_label
from .urls import Target

_FAILURE_SECONDS = 60.0
"""Time for which a URL that failed for good is not requested again."""
_MAX_FAILURES = 4096


class Fetcher:
    """Fetches the images of rows. An async context manager for one event loop.

    Any number of rows may wait: while they do, they are descriptors without a task.

    Args:
        options: Limits.
        arena: Arena of encoded images, which is the fetcher's alone.
        requester: Requests the images; by default, in this process.
        backoff: Seconds before the first retry, doubled for each further one.

    Attributes:
        waiting_bytes: Bytes of memory of the rows that wait, by what `submit` was told.
    """

    def __init__(
        self,
        options: FetchOptions,
        arena: Arena,
        requester: Requester | None = None,
        *,
        backoff: float = FIRST_BACKOFF_SECONDS,
    ) -> None:
        self._options, self._arena, self._backoff = options, arena, backoff
        self._client = ImageClient(options, requester)
        self._cache = ImageCache(arena)
        self._downloads: dict[str, Download] = {}
        self._fetches: dict[int, Fetch] = {}  # by number: oldest first
        self._inline: deque[Fetch] = deque()
        """Rows with inline images and with all web images, which wait for room."""
        self._failures: TTLCache[str, tuple[type[RowError], str]] = TTLCache(_MAX_FAILURES, _FAILURE_SECONDS)
        self._next_number = 0
        self._unclaimed: dict[int, Fetched] = {}  # by number
        """Results that are neither claimed nor released."""
        self._in_use = 0
        """Results that are claimed and not released."""
        self._urgent = 0
        """Rows that wait and are urgent."""
        self._is_woken = False
        self._changed = asyncio.Event()
        self.waiting_bytes = 0

    async def __aenter__(self) -> Fetcher:
        self._loop = asyncio.get_running_loop()
        await self._client.__aenter__()
        self._dispatcher = Dispatcher(
            self._options,
            self._client,
            self._cache,
            on_end=self._end_download,
            on_change=self._wake,
            on_bug=self._end_all,
            backoff=self._backoff,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fetch in list(self._fetches.values()):
            self.cancel(fetch)
        await self._dispatcher.close()
        self._cache.clear()
        await self._client.__aexit__(kind, error, trace)

    async def fetch(self, images: Sequence[ImageRef]) -> Fetched:
        """Fetch the images of a row, and claim them. Files are left to the image workers.

        If one image fails, or the call is cancelled, the others are given up and no space in the arena stays reserved.

        Raises:
            FetchError: The first image that fails.
            TooLarge: The row does not fit the arena.
        """
        done = asyncio.Event()
        fetch = self.submit(images, lambda _: done.set(), is_urgent=True)
        try:
            await done.wait()
        except asyncio.CancelledError:
            if fetch.fetched is not None:
                fetch.fetched.release()
            self.cancel(fetch)
            raise
        return fetch.result()

    def submit(
        self, images: Sequence[ImageRef], on_done: Callable[[Fetch], object], size: int = 0, *, is_urgent: bool = False
    ) -> Fetch:
        """Start to fetch the images of a row, as soon as their hosts and the arena allow.

        Args:
            images: The images.
            on_done: Called once with the fetch, now or later, unless it is cancelled.
            size: Bytes of memory that the row takes while it waits.
            is_urgent: Whether it is claimed at once, and results that nobody has claimed are revoked if it has no room.
        """
        fetch = Fetch(images, on_done, self._next_number, size, is_urgent=is_urgent)
        self._urgent += is_urgent
        self._next_number += 1
        self._fetches[fetch.number] = fetch
        self.waiting_bytes += size
        try:
            for position, image in enumerate(images):
                if isinstance(image, WebImage):
                    fetch.targets[position] = self._client.parse(image)
                elif isinstance(image, InlineImage):
                    check_inline(image, self._options.max_image_bytes)
            if sum(map(self._cache.room, map(_length, fetch.inline_images()))) > self._arena.size:
                raise self._too_large(fetch)
        except RowError as error:
            self._end(fetch, error=error)
            return fetch
        self._request(fetch)
        return fetch

    def cancel(self, fetch: Fetch) -> None:
        """Give up a fetch, without a call of `on_done`. Without effect if it is done."""
        if self._fetches.pop(fetch.number, None) is not None:
            self.waiting_bytes -= fetch.size
            self._urgent -= fetch.is_urgent
            self._let_go(fetch)
            self._wake()

    def claim(self, fetched: Fetched) -> bool:
        """See `Fetched.claim`."""
        if not (fetched.is_claimed or fetched.is_revoked):
            del self._unclaimed[fetched.number]
            fetched.is_claimed = True
            self._in_use += 1
        return fetched.is_claimed

    def release(self, fetched: Fetched) -> None:
        """See `Fetched.release`."""
        if fetched.is_revoked:
            return
        if fetched.is_claimed:
            self._in_use -= 1
        else:
            del self._unclaimed[fetched.number]
        self._give_back(fetched)

    def _give_back(self, fetched: Fetched) -> None:
        for image in fetched.images:
            self._cache.release(image)
        self._arena.release(*fetched.inline)
        self._wake()

    @property
    def waiting(self) -> int:
        """Number of rows that wait."""
        return len(self._fetches)

    @property
    def is_hungry(self) -> bool:
        """Whether more downloads could start than are waiting."""
        return self._dispatcher.is_hungry and not self._inline

    @property
    def is_settled(self) -> bool:
        """Whether no other rows have to be fetched before those that were set aside; see `Dispatcher.is_settled`."""
        return not self._inline and self._dispatcher.is_settled

    async def wait_for_change(self) -> None:
        """Wait until a download has started or ended, or a row has been released or cancelled."""
        self._changed.clear()
        await self._changed.wait()

    def set_aside(self) -> bool:
        """Give up, for now, rows that wait for one host, to make room for others to wait; see `Fetch.set_aside`.

        Return False if there is no host for which several rows wait without need.
        """
        return self._dispatcher.set_aside()

    def probe_hosts(self) -> None:
        """Let every host that did not respond have another request at once."""
        self._dispatcher.probe_hosts()

    def _request(self, fetch: Fetch) -> None:
        """Request the web images of a fetch that are not there yet."""
        now = self._loop.time()
        for position, target in fetch.targets.items():
            key = target.key
            if key in fetch.held or key in fetch.missing:
                continue
            if (image := self._cache.find(key, now)) is not None:
                self._hold(fetch, image)
            elif (failure := self._failures.get(key)) is not None:
                self._end(fetch, error=failure[0](failure[1]))
                return
            else:
                self._join(fetch, target, source_label(fetch.images[position]))
                if fetch.is_done:
                    return
        if fetch.missing:
            return
        if fetch.inline is None and fetch.inline_images():
            self._inline.append(fetch)
            self._wake()
        else:
            self._end(fetch)

    def _join(self, fetch: Fetch, target: Target, name: str) -> None:
        """Let a fetch wait for a download, which begins unless it is on its way."""
        download = self._downloads.get(target.key)
        if download is not None:
            fetch.missing[target.key] = download
            download.fetches.append(fetch)
            return
        is_first = fetch.has_yielded or fetch.is_urgent
        download = Download(target, name, self._client.start(target), is_first=is_first)
        self._downloads[target.key] = fetch.missing[target.key] = download
        download.fetches.append(fetch)
        self._dispatcher.add(download, behind=0 if is_first else None)
        if fetch.is_urgent:
            self._wake()  # perhaps others are to make room

    def _end_download(self, download: Download, outcome: Outcome) -> None:
        """Hand the outcome of a download to all who wait for it."""
        del self._downloads[download.target.key]
        fetches, download.fetches = download.fetches, []
        error = outcome.error
        if isinstance(error, RowError) and not error.retryable:
            self._failures[download.target.key] = type(error), str(error)
        image = None
        if outcome.extent is not None:
            if download.may_be_kept:
                self._client.keep(download.target, self._arena.at(outcome.extent))
            image = self._cache.add(download.target.key, outcome.extent, self._loop.time())
            self._cache.use(image)  # at least until all have seen it
        for fetch in fetches:
            del fetch.missing[download.target.key]
            if error is not None:
                self._end(fetch, error=error, set_aside=outcome.set_aside)
            elif image is not None:
                self._hold(fetch, image)
                fetch.seconds = max(fetch.seconds, download.seconds)
                if not fetch.missing:
                    self._request(fetch)  # what it has given up in the meantime
        if image is not None:
            self._cache.release(image)

    def _hold(self, fetch: Fetch, image: CachedImage) -> None:
        self._cache.use(image)
        fetch.held[image.key] = image

    def _end(self, fetch: Fetch, *, error: Exception | None = None, set_aside: SetAside | None = None) -> None:
        """Conclude a fetch: with an error, or with its images, which are all there."""
        if self._fetches.pop(fetch.number, None) is None:
            return
        self.waiting_bytes -= fetch.size
        self._urgent -= fetch.is_urgent
        if error is not None:
            fetch.error, fetch.set_aside = error, set_aside
            self._let_go(fetch)
        else:
            fetch.fetched = gather(fetch, self)
            self._unclaimed[fetch.number] = fetch.fetched
            if fetch.is_urgent:
                self.claim(fetch.fetched)
        self._wake()
        fetch.on_done(fetch)

    def _let_go(self, fetch: Fetch) -> None:
        """Give up all that a fetch holds or waits for."""
        for key, download in fetch.missing.items():
            download.fetches.remove(fetch)
            if not download.fetches:
                del self._downloads[key]
                self._dispatcher.cancel(download)
        fetch.missing.clear()
        for image in fetch.held.values():
            self._cache.release(image)
        fetch.held.clear()
        if fetch.inline is not None:
            self._arena.release(*fetch.inline)
            fetch.inline = None

    def _wake(self) -> None:
        """Look for what can start, once for all changes of this step of the event loop."""
        if not self._is_woken:
            self._is_woken = True
            self._loop.call_soon(self._step)

    def _step(self) -> None:
        self._is_woken = False
        try:
            self._start_what_can_start()
        except Exception as error:
            self._end_all(error)
        self._changed.set()

    def _end_all(self, error: Exception) -> None:
        """Let all rows see a bug."""
        for fetch in list(self._fetches.values()):
            self._end(fetch, error=error)

    def _start_what_can_start(self) -> None:
        dispatcher = self._dispatcher
        if not self._is_inline_first:
            dispatcher.dispatch()
        if self._is_inline_first:
            self._take_room()
            if not self._inline or not (dispatcher.active or self._in_use):  # else the first gets what is freed
                dispatcher.dispatch()
        if (self._inline or dispatcher.is_blocked) and not dispatcher.active and not self._in_use:
            self._break_deadlock()

    @property
    def _is_inline_first(self) -> bool:
        """Whether the oldest row that waits for room needs it for inline images."""
        blocked = self._dispatcher.blocked
        if not self._inline or blocked is None:
            return bool(self._inline)
        return self._inline[0].number < min((fetch.number for fetch in blocked.fetches), default=self._next_number)

    def _take_room(self) -> None:
        """Take the room for rows' inline images, as far as there is some: these rows are complete."""
        while self._inline:
            fetch = self._inline[0]
            if fetch.number not in self._fetches:  # cancelled
                self._inline.popleft()
            elif len(fetch.held) < len({target.key for target in fetch.targets.values()}):
                self._inline.popleft()
                self._request(fetch)  # what it has given up
            else:
                extents = self._cache.reserve([len(image.data) for image in fetch.inline_images()])
                if extents is None:
                    return
                self._inline.popleft()
                copy_inline(fetch, self._arena, extents)
                self._end(fetch)

    def _break_deadlock(self) -> None:
        """Let the youngest row that holds images give them up, or fail it if it is only in its own way."""
        if self._urgent and self._unclaimed:
            _, fetched = self._unclaimed.popitem()
            fetched.is_revoked = True
            self._give_back(fetched)
            self._dispatcher.pass_over()
            return
        if self._unclaimed:
            return  # they will be released
        holders = [fetch for fetch in self._fetches.values() if fetch.held]
        if not holders:
            return
        youngest, blocked = holders[-1], self._dispatcher.blocked
        waiters = [self._inline[0]] if self._is_inline_first or blocked is None else blocked.fetches
        if len(holders) == 1 and youngest in waiters:
            if youngest.has_made_room:
                self._end(youngest, error=self._too_large(youngest))
                return
            youngest.has_made_room = True  # the room that the other image needs may have been overestimated
        for image in youngest.held.values():
            self._cache.release(image)
        youngest.held.clear()
        youngest.has_yielded = True
        # One that made room for itself alone would do so for ever, and older ones behind it would have no turn.
        oldest = min((fetch.number for fetch in waiters), default=self._next_number)
        self._dispatcher.pass_over(is_last=youngest.number <= oldest)
        self._wake()

    def _too_large(self, fetch: Fetch) -> TooLarge:
        count = len(fetch.images)
        return TooLarge(
            f"the row's {count} images have more bytes than the arena's {self._arena.size:,} for encoded images: "
            "set a larger --arena-bytes, or use fewer or smaller images"
        )


def _length(image: InlineImage) -> int:
    return len(image.data)
