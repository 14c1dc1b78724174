"""The stages before the engine: rows become requests, and their images are fetched, decoded and prepared."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import IO, NamedTuple

from ..concurrency import ByteSemaphore, SharedTask
from ..config.options import FetchOptions, ImageOptions
from ..config.units import Size
from ..errors import OptionError, RowError
from ..hardware.limits import cpus
from ..ipc.arena import BLOCK, Arena, default_arena_bytes
from ..storage.disk import as_stopped_early
from ..types import Extent, Failure, Image, Request, Row
from .fetch import Fetcher
from .messages import WorkerLimits
from .preparation import PreparationSpec
from .sources import source_label
from .worker_pool import ImageWorkers

INLINE_BYTES = 256 * 2**20
"""Bytes of inline images that the rows in flight may carry."""


class PreparedGroup(NamedTuple):
    """Rows about the same images, ready for the engine."""

    requests: dict[int, Request | Failure]
    """By row number."""
    images: tuple[Image, ...]
    extent: Extent | None = None
    """The tensors of all rows in the arena."""
    fetch_seconds: float = 0.0
    prepare_seconds: float = 0.0


def _ignore(stage: str, seconds: float) -> None:
    """Discard a stage's seconds."""


class ImagePipeline:
    """Turns rows into what an engine takes. An async context manager that owns arenas, fetcher and image workers.

    Call `load` once before the first row.

    Args:
        fetch: Limits for fetching.
        image: Limits for decoding, the number of workers and the size of the arenas.
        roots: Directories that image files may lie in. Relative paths start from the first.
        log: File for the output of the image workers. None discards it.
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
        self._make_request: Callable[[Row], Request]
        self.worker_count = image.image_workers or cpus()
        self.inline_budget = ByteSemaphore(INLINE_BYTES)
        """Bounds the bytes of inline images that rows in flight carry. Rows take their share before `prepare_group`."""

    async def __aenter__(self) -> ImagePipeline:
        async with AsyncExitStack() as stack:
            # A quarter for files: the pixels of thirteen tiles are 16 MB, the file is about a hundredth of that.
            encoded = self._open_arena(stack, self._arena_bytes // 4)
            self.tensors = self._open_arena(stack, self._arena_bytes * 3 // 4)
            limits = WorkerLimits(self._image, self._fetch.max_image_bytes, tuple(map(str, self._roots)))
            workers = ImageWorkers(
                self.worker_count, limits, encoded, self.tensors, self._open_log(stack), preload=self._preload
            )
            self._workers = await stack.enter_async_context(workers)
            self._fetcher = await stack.enter_async_context(Fetcher(self._fetch, encoded))
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
        await self._workers.load(preparation)

    @property
    def busy_seconds(self) -> float:
        """Seconds that image workers have worked, summed over the workers."""
        return self._workers.busy_seconds

    def request(self, row: Row) -> Request:
        """Return the request of a row that needs no preparation. Raises RowError."""
        return self._make_request(row)

    def prepare_group(self, rows: Sequence[Row]) -> SharedTask[PreparedGroup]:
        """Return a task that fetches and prepares the images of rows, for each of these rows to await.

        All rows have the same images. The task raises RowError or RowFailed if it fails for all rows.
        """
        return SharedTask(len(rows), lambda: self._prepare(rows), self._release)

    async def _prepare(self, rows: Sequence[Row]) -> PreparedGroup:
        requests: dict[int, Request | Failure] = {}
        for row in rows:
            try:
                requests[row.number] = self._make_request(row)
            except RowError as error:
                requests[row.number] = Failure.of(error)
        pending = [request for request in requests.values() if isinstance(request, Request)]
        if not pending:
            return PreparedGroup(requests, image_stubs(rows[0]))
        started = time.monotonic()
        fetched = await self._fetcher.fetch(rows[0].images)
        fetch_seconds = time.monotonic() - started
        self._on_stage_seconds("fetch", fetch_seconds * len(rows))
        try:
            prepared = await self._workers.prepare(pending, fetched.sources)
        finally:
            fetched.release()
        self._on_stage_seconds("prepare", prepared.seconds * len(rows))
        for request, outcome in zip(pending, prepared.requests, strict=True):
            requests[request.row] = outcome
        return PreparedGroup(requests, prepared.images, prepared.extent, fetch_seconds, prepared.seconds)

    def _release(self, group: PreparedGroup) -> None:
        if group.extent is not None:
            self.tensors.release(group.extent)

    def _open_arena(self, stack: AsyncExitStack, size: int) -> Arena:
        try:
            arena = Arena(max(1, size // BLOCK), BLOCK)
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
