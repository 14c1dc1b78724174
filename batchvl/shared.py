"""What several tasks need, made once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A thing that so many `users` get once each: made for the first who comes, let go of when the last is done.

    What `make` raises, every user gets. Where all users are cancelled while it is made, so is that.

    >>> async def example() -> list[int]:
    ...     async def make() -> list[int]:
    ...         return [7]
    ...     gone: list[int] = []
    ...     shared = Shared(2, make, gone.extend)
    ...     for _ in range(2):
    ...         assert await shared.get() == [7] and not gone
    ...         shared.done()
    ...     return gone
    >>> asyncio.run(example())
    [7]
    """

    def __init__(self, users: int, make: Callable[[], Coroutine[Any, Any, T]], let_go: Callable[[T], None]) -> None:
        self._users = self._left = users
        self._make, self._let_go = make, let_go
        self._making: asyncio.Task[T] | None = None
        self._made: tuple[T] | None = None

    async def get(self) -> T:
        """The thing. Whoever asks for it calls `done` afterwards, whatever came of it."""
        if self._users == 1:  # a task of its own would be for nothing
            self._made = (await self._make(),)
            return self._made[0]
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make())
        return await asyncio.shield(self._making)

    def done(self) -> None:
        """A user needs it no more."""
        self._left -= 1
        if self._left:
            return
        making = self._making
        if making is not None and not making.done():
            making.cancel()
        elif making is not None and not making.cancelled() and making.exception() is None:
            self._made = (making.result(),)
        if self._made is not None:
            self._let_go(self._made[0])
