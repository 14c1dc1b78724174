"""A bounded memory of what was found out lately."""

from __future__ import annotations

from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """A dict of at most `size` entries, which forgets those that nobody has asked for longest, many at a time.

    Two dicts take turns: once the younger has half of `size`, it becomes the older one, which is let go. So an entry
    costs no more than a dict's does, unlike that of a list in order of use.

    >>> recent = Recent[int, str](4)
    >>> for number in (1, 2, 1, 3, 1, 4, 5):
    ...     recent[number] = str(number)
    >>> [number for number in range(7) if number in recent]
    [1, 3, 4, 5]
    """

    def __init__(self, size: int) -> None:
        self._half = max(1, size // 2)
        self._young: dict[K, V] = {}
        self._old: dict[K, V] = {}

    def __contains__(self, key: K) -> bool:
        return key in self._young or key in self._old

    def __getitem__(self, key: K) -> V:
        if key not in self._young:
            self[key] = self._old[key]
        return self._young[key]

    def __setitem__(self, key: K, value: V) -> None:
        if len(self._young) >= self._half and key not in self._young:
            self._young, self._old = {}, self._young
        self._young[key] = value
