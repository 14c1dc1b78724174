"""Whether a URL can be fetched, as far as its own text tells: `UrlChecker`."""

from __future__ import annotations

import re
import socket
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from ..errors import FetchError
from ..recent import Recent
from ..types import WebImage
from .http import TransientError, failure
from .labels import source_label
from .network import AddressRefused, NetworkGuard

_AUTHORITY = re.compile(r"https?://[^/?#]*", re.IGNORECASE)
_LABEL = r"(?!xn--)[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_NAME = re.compile(
    rf"https?://(?:{_LABEL}\.){{1,3}}(?!localhost\b)[a-z][a-z0-9]+(?::[1-9]\d{{0,3}})?(?=[/?#]|\Z)", re.IGNORECASE
)
"""A name that can only be looked up. What is written otherwise (addresses, `127.1`, users) is for aiohttp to read."""
_REMEMBERED = 65_536


class UrlChecker:
    """Finds URLs that a fetch would refuse by their text, without a lookup, a connection or a server.

    It goes the way of a fetch, through the same library and the same guard, up to where a name would be looked up or a
    connection made, and so says what the fetch would. An asynchronous context manager.
    """

    def __init__(self, guard: NetworkGuard) -> None:
        self._guard = guard
        self._found: Recent[str, tuple[type[FetchError], str] | None] = Recent(_REMEMBERED)

    async def __aenter__(self) -> UrlChecker:
        connector = aiohttp.TCPConnector(
            socket_factory=self._no_socket, resolver=_NoLookup(self._guard), use_dns_cache=False
        )
        self._session = aiohttp.ClientSession(connector=connector, trust_env=False)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._session.close()

    async def check(self, image: WebImage) -> None:
        """Raises what the fetch would: InvalidUrl or ForbiddenAddress."""
        if _NAME.match(image.url):
            return
        authority = found[0] if (found := _AUTHORITY.match(image.url)) else image.url
        if authority not in self._found:
            self._found[authority] = await self._refusal(authority)
        if (refusal := self._found[authority]) is not None:
            kind, text = refusal
            raise kind(source_label(image) + text)

    async def _refusal(self, authority: str) -> tuple[type[FetchError], str] | None:
        """The error, and its text after the URL."""
        try:
            (await self._session.get(authority)).close()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            found = failure(error, "")
            return None if isinstance(found, TransientError) else (type(found), str(found))
        return None

    def _no_socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        self._guard.socket(info).close()
        raise _NotTried


class _NoLookup(AbstractResolver):
    """Reads addresses in whatever form the system does (`0x7f.1`), knows `localhost`, and asks nobody about names."""

    def __init__(self, guard: NetworkGuard) -> None:
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = ["127.0.0.1", "::1"] if host.lower() == "localhost" else _numeric(host)
        if addresses and not any(map(self._guard.allows, addresses)):
            raise AddressRefused(f"{host} leads to {addresses[0]}, which is not a public address")
        raise _NotTried

    async def close(self) -> None:
        """Nothing is open."""


def _numeric(host: str) -> list[str]:
    """The addresses that a host is written as; none of a name. Raises ValueError for what can be no name either."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return []
    return [str(address[0]) for *_, address in found]


class _NotTried(OSError):
    """Here a fetch would go on. To `failure` it is one of those that may pass."""
