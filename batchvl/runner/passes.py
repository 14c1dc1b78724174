"""The order in which rows are read: all that are left, then again those whose hosts did not respond."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable

from ..fetching.download import SetAside
from ..images.fetch_ahead import FetchedGroup
from ..images.grouping import group_by_images
from ..images.pipeline import ImagePipeline
from ..results.rowset import RowSet
from ..types import Row

ReadRows = Callable[[RowSet | None], AsyncIterator[Row]]
"""Reads the rows of a set; None is all that are left."""


class Passes:
    """Reads rows in groups that share their images, in passes over the manifest.

    Args:
        images: Fetches the groups that are read here.
        read: Reads the rows of a set; None is all that are left.
        look_ahead: How far apart the rows of a group may be.
    """

    def __init__(self, images: ImagePipeline, read: ReadRows, look_ahead: int) -> None:
        self._images, self._read, self._look_ahead = images, read, look_ahead
        self._set_aside, self._met_silence = RowSet(), RowSet()
        """Rows to read again, and all whose host did not respond."""

    def fetched(self) -> AsyncGenerator[FetchedGroup, None]:
        """Yield all groups as their images arrive. The receiver releases their share of the inline budget."""
        return self._images.fetch_ahead(self._groups(), self._leave_for_later)

    async def _groups(self) -> AsyncIterator[list[Row]]:
        """Yield all rows in groups; then, as long as there are any, those that were set aside."""
        async for group in group_by_images(self._read(None), self._look_ahead):
            yield group
        while self._images.waiting or self._set_aside:
            if not (self._images.is_settled and self._set_aside):
                await self._images.wait_for_change()
                continue
            rows, self._set_aside = self._set_aside, RowSet()
            self._images.probe_hosts()
            async for group in group_by_images(self._read(rows), self._look_ahead):
                yield group

    def _leave_for_later(self, rows: list[Row], reason: SetAside) -> bool:
        """Set rows aside. Return False if their host does not respond, and did not the last time either."""
        numbers = [row.number for row in rows]
        if reason is SetAside.SILENT:
            if any(number in self._met_silence for number in numbers):
                return False
            self._met_silence.update(numbers)
        self._set_aside.update(numbers)
        return True
