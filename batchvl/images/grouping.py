"""Rows that share their pictures, brought together."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Hashable

from ..types import Row

MAX_GROUP_SIZE = 64
"""Rows of a group: all of them are prepared before the first is answered, and the pictures stay until the last is."""
INLINE_BYTES = 64 * 2**20
"""Picture bytes that rows in the window may carry themselves, beside the latest row's."""


async def group_by_images(rows: AsyncIterator[Row], size: int) -> AsyncIterator[list[Row]]:
    """The rows in groups: those among `size` rows ahead that have the same pictures in the same order, up to
    MOST_TOGETHER, and each of the others alone. Groups come in the order of their first rows.

    rows: in the manifest's order.
    size: of the manifest's rows, so that where few are left between those that are done, the first does not wait until
    so many are found. 0 or 1 leaves the rows as they come.
    """
    groups: deque[tuple[Hashable, list[Row]]] = deque()
    unfilled: dict[Hashable, list[Row]] = {}
    carried = 0  # bytes that the rows in the window carry
    async for row in rows:
        key = _pictures(row)
        if (group := unfilled.get(key)) is None or row.number - group[0].number >= size:
            group = unfilled[key] = []
            groups.append((key, group))
        group.append(row)
        if len(group) == MAX_GROUP_SIZE:
            del unfilled[key]  # the next row with these pictures begins another
        latest = row.inline_bytes
        carried += latest
        while groups and (row.number - groups[0][1][0].number >= size - 1 or carried - latest > INLINE_BYTES):
            key, group = groups.popleft()
            if unfilled.get(key) is group:
                del unfilled[key]
            if carried:
                carried -= sum(row.inline_bytes for row in group)
            yield group
    for _, group in groups:
        yield group


def _pictures(row: Row) -> Hashable:
    """What rows with the same pictures have in common."""
    return row.images if row.images and row.failure is None else row.number
