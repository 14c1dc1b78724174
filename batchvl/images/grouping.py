"""Grouping of rows that share their images, so that each image is read once."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Hashable

from ..types import Row

MAX_GROUP_SIZE = 64
"""All rows of a group are prepared before the first is answered, and its images stay until the last is answered."""
INLINE_BYTES = 64 * 2**20
"""Bytes of inline images that the rows in the window may carry, the latest row excluded."""


async def group_by_images(
    rows: AsyncIterator[Row], window: int, max_inline_bytes: int = INLINE_BYTES
) -> AsyncIterator[list[Row]]:
    """Yield groups of rows with the same images in the same order, in the order of their first rows.

    Args:
        rows: Rows in the manifest's order.
        window: How far apart the rows of a group may be in the manifest. Rows that are done already count: if few are
            left, the first need not wait for `window` others. 0 or 1 yields each row alone.
        max_inline_bytes: Bytes of inline images that the rows in the window may carry, the latest row excluded.
    """
    groups: deque[tuple[Hashable, list[Row]]] = deque()
    unfilled: dict[Hashable, list[Row]] = {}
    carried = 0  # inline bytes of the rows in the window
    async for row in rows:
        key = _images(row)
        if (group := unfilled.get(key)) is None or row.number - group[0].number >= window:
            group = unfilled[key] = []
            groups.append((key, group))
        group.append(row)
        if len(group) == MAX_GROUP_SIZE:
            del unfilled[key]  # the next row with these images begins another group
        latest = row.inline_bytes
        carried += latest
        while groups and (row.number - groups[0][1][0].number >= window - 1 or carried - latest > max_inline_bytes):
            key, group = groups.popleft()
            if unfilled.get(key) is group:
                del unfilled[key]
            if carried:
                carried -= sum(row.inline_bytes for row in group)
            yield group
    for _, group in groups:
        yield group


def _images(row: Row) -> Hashable:
    """Return a key that is the same for rows with the same images, and unique for rows to be left alone."""
    return row.images if row.images and row.failure is None else row.number
