"""A download: one URL on its way into the arena, for all rows that wait for it; and what a row waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Protocol

from ..ipc.arena import Arena
from ..types import Extent, FileImage, ImageRef, InlineImage, WebImage
from .client import Visit
from .image_cache import CachedImage
from .urls import Target


class SetAside(Enum):
    """Why a row is given up only for now: it may have its images later in the run."""

    SILENT = "silent"
    """The host does not respond."""
    CROWDED = "crowded"
    """Too many rows wait for a host that takes few requests."""


class Download:
    """One URL on its way. While it waits for its host it is only this: no task, no connection, no room.

    Args:
        target: The URL.
        name: Name of the image in messages.
        start: Where the image is looked for first.
        is_first: Whether it comes before all that wait for the same host.
    """

    __slots__ = (
        "attempts",
        "fetches",
        "is_cancelled",
        "is_first",
        "may_be_kept",
        "name",
        "rejections",
        "responses_seen",
        "room",
        "seconds",
        "start",
        "target",
        "task",
        "timer",
        "visit",
    )

    def __init__(self, target: Target, name: str, start: Visit, *, is_first: bool = False) -> None:
        self.target, self.name, self.start, self.is_first = target, name, start, is_first
        self.visit = start
        """What to request next."""
        self.may_be_kept = False
        """Whether the image, once it has arrived, may be kept on a disk."""
        self.fetches: list[Fetch] = []
        """Rows that wait for it."""
        self.attempts = 0
        self.rejections = 0
        """Attempts that the host rejected with 429 or 503."""
        self.responses_seen = 0
        """Responses of the host at the time of the last rejection."""
        self.seconds = 0.0
        """Time spent on attempts and on pauses between them."""
        self.room = 0
        """Bytes to reserve before the next attempt; 0: once the length is known."""
        self.is_cancelled = False
        self.task: asyncio.Task[None] | None = None
        """The attempt in progress."""
        self.timer: asyncio.TimerHandle | None = None
        """Starts the next attempt."""


class Fetch:
    """The images of a row, or of rows with the same images, on their way.

    Args:
        images: The images.
        on_done: Called with this once all images are there, or one has failed.
        number: Smaller for older ones.
        size: Bytes of memory that the rows take while they wait.
        is_urgent: Whether somebody waits for it, who does not take the results of others meanwhile.
    """

    __slots__ = (
        "error",
        "fetched",
        "has_made_room",
        "has_yielded",
        "held",
        "images",
        "inline",
        "is_urgent",
        "missing",
        "number",
        "on_done",
        "seconds",
        "set_aside",
        "size",
        "targets",
    )

    def __init__(
        self,
        images: Sequence[ImageRef],
        on_done: Callable[[Fetch], object],
        number: int,
        size: int = 0,
        *,
        is_urgent: bool = False,
    ) -> None:
        self.images, self.on_done, self.number, self.size, self.is_urgent = images, on_done, number, size, is_urgent
        self.targets: dict[int, Target] = {}
        """URLs of the web images, by the position of the image in the row."""
        self.held: dict[str, CachedImage] = {}
        """Web images that have arrived, by key."""
        self.missing: dict[str, Download] = {}
        """Web images that have not arrived, by key."""
        self.inline: list[Extent] | None = None
        """Room of the inline images."""
        self.has_yielded = self.has_made_room = False
        """Whether it has given up images, and whether for other images of its own."""
        self.seconds = 0.0
        """Time spent on the slowest image so far."""
        self.fetched: Fetched | None = None
        """The result, once it is there."""
        self.error: Exception | None = None
        """Why there is no result."""
        self.set_aside: SetAside | None = None
        """Why `error` is only about this time, if it is."""

    @property
    def is_done(self) -> bool:
        return self.fetched is not None or self.error is not None

    def result(self) -> Fetched:
        """Return the result, or raise why there is none."""
        if self.error is not None:
            raise self.error
        if self.fetched is None:
            raise RuntimeError("the fetch is not done")
        return self.fetched

    def inline_images(self) -> list[InlineImage]:
        return [image for image in self.images if isinstance(image, InlineImage)]


class Fetched:
    """The images of a row. They may be revoked until they are claimed.

    Args:
        extents: In the row's order, their bytes in the arena; None for files, which are left to the image workers.
        seconds: Time spent on the slowest image, without the time in which it waited for its turn.
        images: The web images.
        inline: Room of the inline images.
        owner: Keeps the ledger.
        number: That of the fetch.
    """

    __slots__ = ("_owner", "extents", "images", "inline", "is_claimed", "is_revoked", "number", "seconds")

    def __init__(
        self,
        extents: tuple[Extent | None, ...],
        seconds: float,
        images: tuple[CachedImage, ...],
        inline: tuple[Extent, ...],
        owner: Owner,
        number: int,
    ) -> None:
        self.extents, self.seconds, self.images, self.inline = extents, seconds, images, inline
        self.number, self._owner = number, owner
        self.is_claimed = self.is_revoked = False

    def claim(self) -> bool:
        """Keep the images from now on, until `release`. Return False if they have been revoked."""
        return self._owner.claim(self)

    def release(self) -> None:
        """Release the space in the arena. Call exactly once, when no worker reads it any more."""
        self._owner.release(self)


class Owner(Protocol):
    """Who keeps the ledger of results."""

    def claim(self, fetched: Fetched) -> bool:
        """See `Fetched.claim`."""
        ...

    def release(self, fetched: Fetched) -> None:
        """See `Fetched.release`."""
        ...


def gather(fetch: Fetch, owner: Owner) -> Fetched:
    """Return the result of a fetch whose images are all there. The room that it holds passes to the result."""
    inline = iter(fetch.inline or ())
    extents: list[Extent | None] = []
    for position, image in enumerate(fetch.images):
        if isinstance(image, FileImage):
            extents.append(None)
        elif isinstance(image, WebImage):
            extents.append(fetch.held[fetch.targets[position].key].extent)
        else:
            extents.append(next(inline))
    images, fetch.held = tuple(fetch.held.values()), {}
    taken, fetch.inline = tuple(fetch.inline or ()), None
    return Fetched(tuple(extents), fetch.seconds, images, taken, owner, fetch.number)


def copy_inline(fetch: Fetch, arena: Arena, extents: list[Extent]) -> None:
    """Copy a row's inline images into their room."""
    fetch.inline = extents
    for image, extent in zip(fetch.inline_images(), extents, strict=True):
        arena.at(extent)[:] = image.data
