"""Times in which the proxy cannot be used: no request starts, and no host is blamed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from ..errors import StoppedEarly
from .http1.errors import ProxyError

logger = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 10.0


class Outage:
    """Waits for the proxy. For one event loop, the running one.

    Args:
        check: Raises ProxyError if the proxy cannot be used.
        patience: Seconds after which it is given up.
        on_end: Called when the proxy can be used again.
        on_giving_up: Called with a StoppedEarly when it is given up, or with an exception that nobody else would see.
    """

    def __init__(
        self,
        check: Callable[[], Awaitable[None]],
        patience: float,
        on_end: Callable[[], object],
        on_giving_up: Callable[[Exception], object],
    ) -> None:
        self._check, self._patience = check, patience
        self._on_end, self._on_giving_up = on_end, on_giving_up
        self._task: asyncio.Task[None] | None = None

    @property
    def is_on(self) -> bool:
        """Whether the proxy is being waited for."""
        return self._task is not None

    def begin(self, error: ProxyError) -> None:
        """Wait for the proxy from now on, because of an error."""
        if self._task is None:
            logger.warning(f"{error}: no image is fetched until it can be used")
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give up waiting."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._wait()
        except Exception as error:
            self._task = None
            self._on_giving_up(error)
        else:
            self._task = None
            logger.info("the proxy can be used again")
            self._on_end()

    async def _wait(self) -> None:
        """Wait until the proxy can be used again. Raises StoppedEarly after the time that it is given."""
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE_SECONDS
        started = loop.time()
        while True:
            await asyncio.sleep(pause)
            try:
                await self._check()
            except ProxyError as error:
                if (waited := loop.time() - started) >= self._patience:
                    text = f"{error}, for {waited:.0f} s (--host-patience); run the same command again to resume"
                    raise StoppedEarly(text) from None
                pause = min(2 * pause, _MAX_PAUSE_SECONDS)
            else:
                return
