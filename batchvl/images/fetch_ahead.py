"""Fetching ahead of the engine: groups of rows go in in the manifest's order, and come out as their images arrive.

How far ahead the manifest is read follows from what the hosts and the arena allow: it is read on as long as more
downloads could start than are known. Images that arrive before the engine takes them fill the arena, so that slow
answers are awaited long before they are needed. Groups are bounded in number and in bytes. When too many wait for their
images, those of a host that makes rows wait (it asked for fewer requests, or does not respond) are set aside.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from ..concurrency import ByteSemaphore
from ..fetching.download import Fetch, Fetched, SetAside
from ..fetching.fetcher import Fetcher
from ..types import Failure, FileImage, Request, Row, WebImage

MAX_UNFETCHED_ROWS = 256
"""Rows that are read ahead although nothing of them has to be fetched."""
MAX_GROUPS = 16_384
"""Groups that wait for images, and as many that have them."""
MAX_BYTES = 64 * 2**20
"""Bytes of these rows, each time, without their inline images, which have a limit of their own."""
_ROW_BYTES = 1024
"""A row's objects, besides its text."""


@dataclass(slots=True)
class FetchedGroup:
    """Rows with the same images, and these images or why there are none."""

    rows: list[Row]
    requests: dict[int, Request | Failure]
    """Requests of the rows by row number, without images; empty for rows that have no images."""
    fetched: Fetched | None = None
    error: Exception | None = None
    size: int = 0
    """Bytes of memory that the rows take if something of them is fetched, 0 otherwise."""

    @property
    def needs_images(self) -> bool:
        """Whether any row gets on with images."""
        return any(isinstance(request, Request) for request in self.requests.values())


def begin_group(rows: list[Row], make_requests: Callable[[list[Row]], dict[int, Request | Failure]]) -> FetchedGroup:
    """Return a group of which nothing is fetched yet. Requests come first: none of its images may be needed."""
    has_images = rows[0].failure is None and bool(rows[0].images)
    return FetchedGroup(rows, make_requests(rows) if has_images else {})


class FetchAhead:
    """Fetches the images of groups. `read` and `groups` run concurrently.

    Args:
        fetcher: Fetches the images.
        make_requests: Makes the requests of rows.
        inline_budget: Rows take their share of it; whoever receives a group releases it.
        set_aside: Called with rows that do not get their images at this time, and the reason. If it returns True, they
            are left to the caller, who reads them again later; otherwise they fail.
        is_urgent: Whether images that others have fetched ahead are revoked if there is no room. Such groups are few.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        make_requests: Callable[[list[Row]], dict[int, Request | Failure]],
        inline_budget: ByteSemaphore,
        set_aside: Callable[[list[Row], SetAside], bool],
        *,
        is_urgent: bool = False,
    ) -> None:
        self._fetcher, self._make_requests, self._inline_budget = fetcher, make_requests, inline_budget
        self._set_aside, self._is_urgent = set_aside, is_urgent
        self._waiting: dict[int, Fetch] = {}  # by number
        self._ready: deque[FetchedGroup] = deque()
        self._ready_bytes = self._unfetched_rows = 0
        self._changed = asyncio.Event()

    async def groups(self, groups: AsyncIterator[list[Row]]) -> AsyncGenerator[FetchedGroup, None]:
        """Yield groups as their images arrive, until there are no more."""
        reader = asyncio.create_task(self._read(groups))
        reader.add_done_callback(lambda _: self._changed.set())
        try:
            while True:
                while self._ready:
                    group = self._ready.popleft()
                    self._count(group, -1)
                    self._changed.set()
                    yield group
                if reader.done():
                    reader.result()
                    if not self._waiting:
                        return
                self._changed.clear()
                await self._changed.wait()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            for fetch in list(self._waiting.values()):
                self._fetcher.cancel(fetch)
            for group in self._ready:
                if group.fetched is not None:
                    group.fetched.release()

    async def _read(self, groups: AsyncIterator[list[Row]]) -> None:
        async for rows in groups:
            for row in rows:
                await self._inline_budget.acquire(row.inline_bytes)
            self._submit(rows)
            await self._wait_for_turn()

    async def _wait_for_turn(self) -> None:
        """Wait until another group is to be read."""
        fetcher = self._fetcher
        while True:
            if (
                self._unfetched_rows >= MAX_UNFETCHED_ROWS
                or len(self._ready) >= MAX_GROUPS
                or self._ready_bytes >= MAX_BYTES
            ):
                self._changed.clear()
                await self._changed.wait()
            elif self._is_urgent:
                return
            elif not fetcher.is_hungry:
                await fetcher.wait_for_change()
            elif fetcher.waiting < MAX_GROUPS and fetcher.waiting_bytes < MAX_BYTES:
                return
            elif not fetcher.set_aside():
                await fetcher.wait_for_change()

    def _submit(self, rows: list[Row]) -> None:
        """Start to fetch the images of a group."""
        group = begin_group(rows, self._make_requests)
        if not group.needs_images:
            self._add(group)
            return
        if not all(isinstance(image, FileImage) for image in rows[0].images):
            group.size = _size(rows)
        fetch = self._fetcher.submit(
            rows[0].images, lambda fetch: self._receive(group, fetch), group.size, is_urgent=self._is_urgent
        )
        if not fetch.is_done:
            self._waiting[fetch.number] = fetch

    def _receive(self, group: FetchedGroup, fetch: Fetch) -> None:
        self._waiting.pop(fetch.number, None)
        if fetch.set_aside is not None and self._set_aside(group.rows, fetch.set_aside):
            for row in group.rows:
                self._inline_budget.release(row.inline_bytes)
            self._changed.set()
            return
        group.fetched, group.error = fetch.fetched, fetch.error
        self._add(group)

    def _add(self, group: FetchedGroup) -> None:
        self._ready.append(group)
        self._count(group, 1)
        self._changed.set()

    def _count(self, group: FetchedGroup, sign: int) -> None:
        self._ready_bytes += sign * group.size
        if not group.size:
            self._unfetched_rows += sign * len(group.rows)


def _size(rows: list[Row]) -> int:
    """Return about how many bytes of memory rows take while they wait."""
    urls = sum(len(image.url) for image in rows[0].images if isinstance(image, WebImage))
    return sum(_ROW_BYTES + 2 * (urls + len(row.prompt or "")) for row in rows)
