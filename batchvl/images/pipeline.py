"""The stages ahead of the engine: requests, their pictures fetched, and both prepared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

from ..concurrency import SharedTask
from ..errors import RowError
from ..ipc.arena import Arena
from ..prompts.template import Prompter
from ..runner.progress import Progress
from ..types import Extent, Failure, Image, Request, Row
from .fetch import Fetcher, source_label
from .worker_pool import ImageWorkers


class PreparedGroup(NamedTuple):
    """Rows about the same pictures: each one's request or failure, by its number, and the room of their tensors."""

    requests: dict[int, Request | Failure]
    images: tuple[Image, ...]
    extent: Extent | None = None


class ImagePipeline:
    """Takes rows up to where an engine takes them. `arena`: of prepared tensors."""

    def __init__(
        self, prompter: Prompter, fetcher: Fetcher, workers: ImageWorkers, arena: Arena, progress: Progress
    ) -> None:
        self._prompter, self._fetcher, self._workers = prompter, fetcher, workers
        self.arena, self._progress = arena, progress

    def request(self, row: Row) -> Request:
        """What the engine is asked for a row that needs no preparation. Raises RowError."""
        return self._prompter.request(row)

    def together(self, rows: Sequence[Row]) -> SharedTask[PreparedGroup]:
        """All that comes before the engine, for rows that have the same pictures: once, and each of them uses it.

        That raises RowError or RowFailed, where it is for all of them.
        """
        return SharedTask(len(rows), lambda: self._prepare(rows), self._release)

    async def _prepare(self, rows: Sequence[Row]) -> PreparedGroup:
        requests: dict[int, Request | Failure] = {}
        for row in rows:
            try:
                requests[row.number] = self._prompter.request(row)
            except RowError as error:
                requests[row.number] = Failure.of(error)
        asked = [request for request in requests.values() if isinstance(request, Request)]
        if not asked:
            return PreparedGroup(requests, image_stubs(rows[0]))
        started = time.monotonic()
        fetched = await self._fetcher.fetch(rows[0].images)
        self._progress.spent("fetch", (time.monotonic() - started) * len(rows))
        try:
            prepared = await self._workers.prepare(asked, fetched.sources)
        finally:
            fetched.release()
        self._progress.spent("prepare", prepared.seconds * len(rows))
        for request, found in zip(asked, prepared.requests, strict=True):
            requests[request.row] = found
        return PreparedGroup(requests, prepared.images, prepared.extent)

    def _release(self, ready: PreparedGroup) -> None:
        if ready.extent is not None:
            self.arena.release(ready.extent)


def image_stubs(row: Row) -> tuple[Image, ...]:
    """A row's pictures, of which nothing is known but where they are from."""
    return tuple(Image(source_label(image)) for image in row.images)
