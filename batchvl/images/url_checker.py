"""Checks of URLs by their text alone, as far as that shows whether they can be fetched."""

from __future__ import annotations

import re
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from cachetools import LRUCache

from ..errors import FetchError
from ..types import WebImage
from .http import TransientError, classify
from .network import AddressRefused, NetworkGuard
from .sources import source_label

_AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(
    rf"https?://(?:{_LABEL}\.){{1,3}}(?!localhost\b)[a-z][a-z0-9]+(?::[1-9]\d{{0,3}})?(?=[/?#]|\Z)", re.IGNORECASE
)
"""A URL whose host is plainly a name, to be looked up. aiohttp reads all others: addresses, `127.1`, users, …"""
_CACHE_SIZE = 65_536


class UrlChecker:
    """Finds URLs that a fetch would refuse by their text, without a lookup, a connection or a server.

    It takes the way of a fetch, through the same library and the same guard, up to where a name would be looked up or a
    connection made, and so reports what the fetch would report. An async context manager.
    """

    def __init__(self, guard: NetworkGuard) -> None:
        self._guard = guard
        self._refusals: LRUCache[str, tuple[type[FetchError], str] | None] = LRUCache(_CACHE_SIZE)

    async def __aenter__(self) -> UrlChecker:
        connector = aiohttp.TCPConnector(
            socket_factory=self._no_socket, resolver=_NoLookup(self._guard), use_dns_cache=False
        )
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def check(self, image: WebImage) -> None:
        """Raise what the fetch would raise: InvalidUrl or ForbiddenAddress."""
        if _NAME.match(image.url):
            return
        match = _AUTHORITY.match(image.url)
        authority = match[0] if match else image.url
        if authority not in self._refusals:
            self._refusals[authority] = await self._refusal(authority)
        if (refusal := self._refusals[authority]) is not None:
            kind, text = refusal
            raise kind(source_label(image) + text)

    async def _refusal(self, authority: str) -> tuple[type[FetchError], str] | None:
        """Return the type of the error, and its text after the URL."""
        try:
            (await self._session.get(authority)).close()
        except (aiohttp.ClientError, OSError, ValueError) as exception:
            error = classify(exception, "")
            return None if isinstance(error, TransientError) else (type(error), str(error))
        return None

    def _no_socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        self._guard.socket(info).close()
        raise _NotAttempted


class _NoLookup(AbstractResolver):
    """A resolver of addresses in any form that the system reads (`0x7f.1`), and of `localhost`, but of no names."""

    def __init__(self, guard: NetworkGuard) -> None:
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = ["127.0.0.1", "::1"] if host.lower() == "localhost" else _numeric(host)
        if addresses and not any(map(self._guard.allows, addresses)):
            raise AddressRefused(f"{host} resolves to {addresses[0]}, which is not a public address")
        raise _NotAttempted

    async def close(self) -> None:
        """Do nothing: nothing is open."""


def _numeric(host: str) -> list[str]:
    """Return the addresses that a host is written as, none for a name. Raises ValueError if it cannot be a name."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return []
    return [str(address[0]) for *_, address in addresses]


class _NotAttempted(OSError):
    """A fetch would look up the name or connect here. `classify` takes it for transient."""
