"""The network policy: which addresses the URLs of a manifest may lead to.

A manifest is untrusted text, and a runner often sits inside a cluster: without a guard, a URL could read the cloud's
metadata service or a neighbor's dashboard. The guard checks the address that a socket really connects to, not the text
of the URL: `http://0x7f.1/`, a redirect, and a name that resolves differently between a check and the connection (DNS
rebinding) all arrive at `NetworkGuard.socket`.
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

_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")  # all that is allocated as global unicast: anything else is special
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # an IPv4 address in its last 32 bits (RFC 6052)
_SPECIAL = (
    # `is_global` is true for these, at least in some of the Python versions that we support.
    ipaddress.IPv6Network("2002::/16"),  # 6to4: contains an IPv4 address, reached through whatever relay is near
    ipaddress.IPv4Network("192.0.0.0/24"),  # protocol assignments; Oracle Cloud's metadata service is here
    ipaddress.IPv4Network("192.88.99.0/24"),  # 6to4 relays
    ipaddress.IPv4Network("168.63.129.16/32"),  # Azure's host, as seen by its virtual machines
)


class AddressRefused(OSError):
    """The guard does not allow an address. An OSError: aiohttp makes it the `os_error` of a ClientConnectorError."""


class NetworkGuard:
    """Allows global addresses, and the networks of --allow-private.

    Raises OptionError if one of these is not a network.

    >>> guard = NetworkGuard(["10.1.0.0/16"])
    >>> guard.allows("10.1.2.3"), guard.allows("10.2.2.3"), guard.allows("::ffff:127.0.0.1")
    (True, False, False)
    """

    def __init__(self, allow_private: Iterable[str] = ()) -> None:
        self._allowed = [_parse_network(text) for text in allow_private]

    def allows(self, host: str) -> bool:
        """Return whether connecting to a numeric address is allowed.

        Irregular forms (`127.1`, `2130706433`) are not: the system would interpret them in its own way.
        """
        try:
            address = _innermost(ipaddress.ip_address(host))
        except ValueError:
            return False
        if any(address in network for network in self._allowed):
            return True
        if any(address in network for network in _SPECIAL) or address.is_multicast or not address.is_global:
            return False
        return address.version == 4 or address in _GLOBAL_V6

    def socket(self, info: tuple[int, int, int, str, tuple[Any, ...]]) -> socket.socket:
        """Return a socket for a result of `getaddrinfo`: the `socket_factory` of an aiohttp TCPConnector.

        Raises AddressRefused if the guard does not allow the address.
        """
        family, kind, protocol, _, address = info
        if not self.allows(address[0]):
            raise AddressRefused(f"{address[0]} is not a public address")
        return socket.socket(family, kind, protocol)

    def resolver(self) -> AbstractResolver:
        """Return the system's resolver, less the addresses that the guard does not allow.

        `socket` would refuse these too. But if a host has a public and a private address, as behind a split-horizon
        DNS, only the public one is tried this way, and the error is about that one. `resolve` raises AddressRefused if
        no address is left.
        """
        return _GuardedResolver(self)


class _GuardedResolver(ThreadedResolver):
    def __init__(self, guard: NetworkGuard) -> None:
        super().__init__()
        self._guard = guard

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await super().resolve(host, port, family)
        allowed = [address for address in addresses if self._guard.allows(address["host"])]
        if addresses and not allowed:
            raise AddressRefused(f"{host} resolves to {addresses[0]['host']}, which is not a public address")
        return allowed


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise OptionError(
            f"--allow-private: found {text!r}, expected a network such as 127.0.0.0/8 or an address: {error}"
        ) from None


def _innermost(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address contains, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
