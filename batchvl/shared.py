"""What several tasks need, made once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """A thing that so many `users` use once each: made for the first who comes, let go of after the last.

    What `make` raises, every user gets. Where all users are cancelled while it is made, so is that.

    >>> async def example() -> list[int]:
    ...     async def make() -> list[int]:
    ...         return [7]
    ...     gone: list[int] = []
    ...     shared = Shared(2, make, gone.extend)
    ...     for _ in range(2):
    ...         async with shared.use() as found:
    ...             assert found == [7] and not gone
    ...     return gone
    >>> asyncio.run(example())
    [7]
    """

    def __init__(self, users: int, make: Callable[[], Coroutine[Any, Any, T]], let_go: Callable[[T], None]) -> None:
        self._left, self._make, self._let_go = users, make, let_go
        self._making: asyncio.Task[T] | None = None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[T]:
        """The thing, for as long as the caller is inside."""
        if self._left == 1 and self._making is None:  # the only one: a task of its own would be for nothing
            made = await self._make()
            try:
                yield made
            finally:
                self._let_go(made)
            return
        if self._making is None:
            self._making = asyncio.get_running_loop().create_task(self._make())
        try:
            yield await asyncio.shield(self._making)
        finally:
            self._left -= 1
            if not self._left:
                self._end(self._making)

    def _end(self, making: asyncio.Task[T]) -> None:
        if not making.done():
            making.cancel()
        elif not making.cancelled() and making.exception() is None:
            self._let_go(making.result())
