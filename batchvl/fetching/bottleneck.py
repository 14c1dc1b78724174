"""A host that most downloads wait for, because of --fetch-per-host. The user may know that it takes more requests."""

from __future__ import annotations

import logging
from collections.abc import Collection

from ..config.units import pluralize
from .disk_cache import CACHE
from .host import Host

logger = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
_LOOKS = 3
"""Looks in a row that find the same host."""
_MIN_WAITING = 64
_MIN_SHARE = 0.5
"""Share of the waiting downloads that wait for this host."""
_MAX_NOTES = 3


class Bottleneck:
    """Logs the name of such a host, once.

    Args:
        now: The time.
    """

    def __init__(self, now: float) -> None:
        self._next_look = now + LOOK_SECONDS
        self._host, self._looks = "", 0
        self._noted: set[str] = set()

    def forget(self) -> None:
        """Forget the last looks: something other than a host holds up the downloads."""
        self._looks = 0

    def look(self, hosts: Collection[Host], now: float) -> None:
        """Look at the hosts for which downloads wait, every few seconds. Call it when no download may start."""
        if now < self._next_look or len(self._noted) >= _MAX_NOTES:
            return
        self._next_look = now + LOOK_SECONDS
        host = max(hosts, key=lambda host: len(host.queue), default=None)
        waiting = sum(len(host.queue) for host in hosts)
        least = max(_MIN_WAITING, _MIN_SHARE * waiting)
        if host is None or host.name == CACHE or not host.is_full or len(host.queue) < least:
            self.forget()
            return
        self._looks = self._looks + 1 if host.name == self._host else 1
        self._host = host.name
        if self._looks >= _LOOKS and host.name not in self._noted:
            self._noted.add(host.name)
            images = pluralize(len(host.queue), "image")
            logger.info(
                f"note: {images} wait for {host.name}, from which {host.active} are fetched at a time. "
                "If it takes more, increase --fetch-per-host"
            )
