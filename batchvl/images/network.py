"""The network policy: which addresses a manifest's URLs may lead to.

A manifest is other people's text, and a runner sits inside a cluster: without a guard, a URL in it could read the
cloud's metadata service or a neighbour's dashboard. What counts is the address that a socket really connects to, not
the URL's text: `http://0x7f.1/`, a redirect, and a name whose answer changes between a check and the connection
(DNS rebinding) all arrive at `NetworkGuard.socket`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import Any

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

from ..errors import OptionError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all that is given out as global unicast: anything else is special
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits (RFC 6052)
_SPECIAL = (
    # `is_global` is true of these, or was in some of the Pythons we run on.
    ipaddress.IPv6Network("2002::/16"),  # 6to4: an IPv4 address inside, by way of whatever relay is near
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle's cloud has its metadata here
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's host, as its machines see it
)


class AddressRefused(OSError):
    """The guard's no. An OSError, so that aiohttp wraps it as the `os_error` of its ClientConnectorError."""


class NetworkGuard:
    """Lets global addresses through, and those of the networks that `--allow-private` opened.

    Raises OptionError where a network is not written as one.

    >>> guard = NetworkGuard(["10.1.0.0/16"])
    >>> guard.allows("10.1.2.3"), guard.allows("10.2.2.3"), guard.allows("::ffff:127.0.0.1")
    (True, False, False)
    """

    def __init__(self, allow_private: Iterable[str] = ()) -> None:
        self._opened = [_network(text) for text in allow_private]

    def allows(self, host: str) -> bool:
        """Whether a numeric address may be connected to. What is no plain address (`127.1`, `2130706433`) may not:
        the system would read it in its own way."""
        try:
            address = _innermost(ipaddress.ip_address(host))
        except ValueError:
            return False
        if any(address in network for network in self._opened):
            return True
        if any(address in network for network in _SPECIAL) or address.is_multicast or not address.is_global:
            return False
        return address.version == 4 or address in _GLOBAL_V6

    def socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        """A socket for an address as `getaddrinfo` gives it: aiohttp's `TCPConnector(socket_factory=…)`.

        Raises AddressRefused where the guard does not allow the address.
        """
        family, kind, protocol, _, address = info
        if not self.allows(address[0]):
            raise AddressRefused(f"{address[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    def resolver(self) -> AbstractResolver:
        """The system's resolver without the addresses that the guard refuses.

        `socket` would refuse them too. But of a host with a public and a private address, as behind a split-horizon
        DNS, only the public one is tried then, and a failure to reach it is told as such. With no address left,
        `resolve` raises AddressRefused.
        """
        return _GuardedResolver(self)


class _GuardedResolver(ThreadedResolver):
    def __init__(self, guard: NetworkGuard) -> None:
        super().__init__()
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await super().resolve(host, port, family)
        allowed = [address for address in found if self._guard.allows(address["host"])]
        if found and not allowed:
            raise AddressRefused(f"{host} leads to {found[0]['host']}, which is not a public address")
        return allowed


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise OptionError(
            f"--allow-private: {error}; found {text!r}, want a network such as 127.0.0.0/8, or an address"
        ) from None


def _innermost(address: Address) -> Address:
    """The IPv4 address that an IPv6 address stands for, where it stands for one."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
