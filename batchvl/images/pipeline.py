"""The stages before the engine: rows become requests, and their images are fetched, decoded and prepared."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import IO, NamedTuple

from ..concurrency import ByteSemaphore, SharedTask
from ..config.options import FetchOptions, ImageOptions
from ..config.units import Size
from ..errors import NotAnImage, OptionError, RowError
from ..fetching.download import Fetched, SetAside
from ..fetching.fetcher import Fetcher
from ..fetching.processes.pool import ProcessPool
from ..fetching.sniff import describe, is_image
from ..fetching.sources import check_count, source_label
from ..hardware.limits import cpus
from ..ipc.arena import BLOCK, Arena, default_arena_bytes
from ..storage.disk import as_stopped_early
from ..types import Extent, Failure, FileImage, Image, ImageRef, Request, Row
from .fetch_ahead import MAX_GROUPS, FetchAhead, FetchedGroup, begin_group
from .image_files import ImageFiles
from .messages import Source, WorkerLimits
from .preparation import PreparationSpec
from .worker_pool import ImageWorkers

INLINE_BYTES = 256 * 2**20
"""Bytes of inline images that the rows in flight may carry."""

ENCODED_BLOCK = 16 * 1024
"""Size of a block in the arena of encoded images: a photograph in the web has about 100 KB."""

Buffer = bytes | memoryview


class PreparedGroup(NamedTuple):
    """Rows about the same images, ready for the engine."""

    requests: dict[int, Request | Failure]
    """By row number."""
    images: tuple[Image, ...]
    extent: Extent | None = None
    """The tensors of all rows in the arena."""
    fetch_seconds: float = 0.0
    prepare_seconds: float = 0.0


class EncodedGroup(NamedTuple):
    """The encoded images of rows."""

    images: tuple[Image, ...]
    data: list[Buffer]
    """Valid until the last row's release."""
    fetched: Fetched
    """Where they are, but for files."""
    extent: Extent | None = None
    """Where files are, if image workers read them."""


def _ignore(stage: str, seconds: float) -> None:
    """Discard a stage's seconds."""


class ImagePipeline:
    """Turns rows into what an engine takes. An async context manager that owns arenas, fetcher and image workers.

    Call `load` once before the first row.

    Args:
        fetch: Limits for fetching.
        image: Limits for decoding, the number of workers and the size of the arenas.
        roots: Directories that image files may lie in. Relative paths start from the first.
        log: File for the output of the image workers and of the fetch processes. None discards it.
        preload: Module that the engine's preparation will be in; imported while the engine looks for its model.
        replicas: Number of engines to provide for.
        on_stage_seconds: Called with the name of a stage ("fetch", "prepare") and the seconds that rows spent in it.

    Entering raises OptionError if there is not enough memory for the arenas, and StoppedEarly if the log cannot be
    written.
    """

    def __init__(
        self,
        fetch: FetchOptions,
        image: ImageOptions,
        roots: Sequence[Path],
        *,
        log: Path | None = None,
        preload: str | None = None,
        replicas: int = 1,
        on_stage_seconds: Callable[[str, float], object] = _ignore,
    ) -> None:
        self._fetch, self._image, self._roots, self._log, self._preload = fetch, image, roots, log, preload
        self._arena_bytes = image.arena_bytes or Size(default_arena_bytes(replicas))
        self._on_stage_seconds = on_stage_seconds
        self._files = ImageFiles(self._roots, fetch.max_image_bytes)
        """Read here if images are not decoded; otherwise image workers read files."""
        self._make_request: Callable[[Row], Request]
        self._copies_images = False
        """Whether the engine takes encoded images."""
        self.worker_count = image.image_workers or cpus() + 1  # one may wait for its next job while the others work
        self.inline_budget = ByteSemaphore(INLINE_BYTES)
        """Bounds the bytes of inline images that rows in flight carry. `fetch_ahead` takes their share."""

    async def __aenter__(self) -> ImagePipeline:
        async with AsyncExitStack() as stack:
            # A quarter for files: the pixels of thirteen tiles are 16 MB, the file is about a hundredth of that.
            self._encoded = self._open_arena(stack, self._arena_bytes // 4, ENCODED_BLOCK)
            self.tensors = self._open_arena(stack, self._arena_bytes * 3 // 4)
            limits = WorkerLimits(self._image, self._fetch.max_image_bytes, tuple(map(str, self._roots)))
            log = self._open_log(stack)
            workers = ImageWorkers(self.worker_count, limits, self._encoded, self.tensors, log, preload=self._preload)
            self._workers = await stack.enter_async_context(workers)
            requester = ProcessPool(self._fetch, self._encoded, log) if self._fetch.fetch_processes else None
            self._fetcher = await stack.enter_async_context(Fetcher(self._fetch, self._encoded, requester))
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._stack.aclose()

    async def load(self, preparation: PreparationSpec | None, make_request: Callable[[Row], Request]) -> None:
        """Start loading the engine's preparation; None only checks images. Rows wait until it is loaded.

        Args:
            preparation: How the image workers prepare the engine's inputs.
            make_request: Makes the request of a row, without its images. Raises RowError.
        """
        self._make_request = make_request
        self._copies_images = preparation is not None and preparation.input == "encoded"
        await self._workers.load(preparation)

    @property
    def busy_seconds(self) -> float:
        """Seconds that image workers have worked, summed over the workers."""
        return self._workers.busy_seconds

    def request(self, row: Row) -> Request:
        """Return the request of a row that needs no preparation. Raises RowError."""
        return self._make_request(row)

    async def fetch_ahead(
        self,
        groups: AsyncIterator[list[Row]],
        set_aside: Callable[[list[Row], SetAside], bool] = lambda *_: False,
        *,
        is_urgent: bool = False,
    ) -> AsyncGenerator[FetchedGroup, None]:
        """Yield groups as their images arrive.

        The rows of a group have the same images. They carry their share of `inline_budget`, which the receiver
        releases.

        Args:
            groups: The groups.
            set_aside: Called with rows that do not get their images at this time, and the reason. If it returns True,
                they are not yielded, and the caller reads them again later; otherwise they fail.
            is_urgent: Whether images that another call has fetched ahead are revoked if there is no room.
        """
        ahead = FetchAhead(self._fetcher, self._requests, self.inline_budget, set_aside, is_urgent=is_urgent)
        async with aclosing(ahead.groups(groups)) as fetched_groups:
            async for group in fetched_groups:
                yield group

    async def fetch(self, row: Row) -> FetchedGroup:
        """Fetch the images of one row."""
        group = begin_group([row], self._requests)
        if group.needs_images:
            try:
                group.fetched = await self._fetcher.fetch(row.images)
            except RowError as error:
                group.error = error
        return group

    @property
    def is_settled(self) -> bool:
        """Whether few rows wait, and no others have to be fetched before those that were set aside."""
        return self._fetcher.is_settled and self._fetcher.waiting <= MAX_GROUPS // 2

    async def wait_for_change(self) -> None:
        """Wait until the fetcher has got on."""
        await self._fetcher.wait_for_change()

    @property
    def waiting(self) -> int:
        """Number of rows, or groups of them, that wait for images."""
        return self._fetcher.waiting

    def probe_hosts(self) -> None:
        """Let every host that did not respond have another request at once."""
        self._fetcher.probe_hosts()

    def prepare_group(self, group: FetchedGroup) -> SharedTask[PreparedGroup]:
        """Return a task that prepares the images of rows, for each of these rows to await.

        The task raises RowError or RowFailed if it fails for all rows.
        """
        return SharedTask(len(group.rows), lambda: self._prepare(group), self._release)

    def read_group(self, group: FetchedGroup, *, decode: bool) -> SharedTask[EncodedGroup]:
        """Return a task that reads the encoded images of rows, for each of these rows to await.

        The task raises RowError or RowFailed.

        Args:
            group: The rows.
            decode: Whether image workers decode the images to check them, which takes that `load` was called with None.
        """
        return SharedTask(len(group.rows), lambda: self._read(group, decode), self._release_encoded)

    async def _read(self, group: FetchedGroup, decode: bool) -> EncodedGroup:
        fetched = await self._claim(group)
        if fetched is None:
            raise RuntimeError("the group has no images")
        try:
            return await (self._check if decode else self._read_unchecked)(group.rows[0], fetched)
        except BaseException:
            fetched.release()
            raise

    async def _check(self, row: Row, fetched: Fetched) -> EncodedGroup:
        """Have a worker decode images. It copies those that it reads itself, so that the result is what it checked."""
        pairs = zip(row.images, fetched.extents, strict=True)
        sources = [_source(image, extent, is_copied=extent is None) for image, extent in pairs]
        prepared = await self._workers.prepare([Request(row.number, ())], sources)
        [request] = prepared.requests
        if isinstance(request, Failure):
            raise RuntimeError("image workers without a preparation fail for all requests or none")
        tensors = iter(request.tensors)
        copies = memoryview(b"") if prepared.extent is None else self.tensors.at(prepared.extent)
        data: list[Buffer] = []
        for extent in fetched.extents:
            if extent is not None:
                data.append(self._encoded.at(extent))
            else:
                tensor = next(tensors)
                data.append(copies[tensor.offset : tensor.offset + tensor.shape[0]])
        return EncodedGroup(prepared.images, data, fetched, prepared.extent)

    async def _read_unchecked(self, row: Row, fetched: Fetched) -> EncodedGroup:
        check_count(len(row.images), self._image)
        pairs = zip(row.images, fetched.extents, strict=True)
        data = [await self._read_image(image, extent) for image, extent in pairs]
        images = tuple(
            Image(source_label(image), bytes=len(item)) for image, item in zip(row.images, data, strict=True)
        )
        return EncodedGroup(images, data, fetched)

    async def _read_image(self, image: ImageRef, extent: Extent | None) -> Buffer:
        data: Buffer
        if isinstance(image, FileImage):
            data = await asyncio.to_thread(self._files.read, image)
        elif extent is not None:
            data = self._encoded.at(extent)
        else:
            raise RuntimeError("the image was not fetched")
        if not is_image(beginning := bytes(data[:512])):
            raise NotAnImage(f"{source_label(image)}: found {describe(beginning)}, expected an image")
        return data

    async def _claim(self, group: FetchedGroup) -> Fetched | None:
        """Return the images of a group, fetched again if they were revoked. Raise why there are none."""
        if group.error is not None:
            raise group.error
        if group.fetched is not None and not group.fetched.claim():
            return await self._fetcher.fetch(group.rows[0].images)
        return group.fetched

    def _requests(self, rows: Sequence[Row]) -> dict[int, Request | Failure]:
        requests: dict[int, Request | Failure] = {}
        for row in rows:
            try:
                requests[row.number] = self._make_request(row)
            except RowError as error:
                requests[row.number] = Failure.of(error)
        return requests

    async def _prepare(self, group: FetchedGroup) -> PreparedGroup:
        rows, requests = group.rows, group.requests or self._requests(group.rows)
        pending = [request for request in requests.values() if isinstance(request, Request)]
        if not pending:
            return PreparedGroup(requests, image_stubs(rows[0]))
        fetched = await self._claim(group)
        fetch_seconds = 0.0 if fetched is None else fetched.seconds
        self._on_stage_seconds("fetch", fetch_seconds * len(rows))
        try:
            pairs = zip(rows[0].images, fetched.extents, strict=True) if fetched is not None else ()
            sources = [_source(image, extent, is_copied=self._copies_images) for image, extent in pairs]
            prepared = await self._workers.prepare(pending, sources)
        finally:
            if fetched is not None:
                fetched.release()
        self._on_stage_seconds("prepare", prepared.seconds * len(rows))
        for request, outcome in zip(pending, prepared.requests, strict=True):
            requests[request.row] = outcome
        return PreparedGroup(requests, prepared.images, prepared.extent, fetch_seconds, prepared.seconds)

    def _release(self, group: PreparedGroup | EncodedGroup) -> None:
        if group.extent is not None:
            self.tensors.release(group.extent)

    def _release_encoded(self, group: EncodedGroup) -> None:
        group.fetched.release()
        self._release(group)

    def _open_arena(self, stack: AsyncExitStack, size: int, block: int = BLOCK) -> Arena:
        try:
            arena = Arena(max(1, size // block), block)
        except OSError as error:
            raise OptionError(
                f"--arena-bytes: cannot allocate {self._arena_bytes} of shared memory: {error.strerror}"
            ) from None
        stack.callback(arena.close)
        return arena

    def _open_log(self, stack: AsyncExitStack) -> IO[bytes]:
        if self._log is None:
            return stack.enter_context(tempfile.TemporaryFile())
        try:
            return stack.enter_context(self._log.open("wb"))
        except OSError as error:
            raise as_stopped_early(self._log, error) from error


def image_stubs(row: Row) -> tuple[Image, ...]:
    """Return a row's images when only their sources are known."""
    return tuple(Image(source_label(image)) for image in row.images)


def _source(image: ImageRef, extent: Extent | None, *, is_copied: bool) -> Source:
    return Source(source_label(image), image if isinstance(image, FileImage) else None, extent, is_copied)
