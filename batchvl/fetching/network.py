"""The network policy: which addresses the URLs of a manifest may lead to.

A manifest is untrusted text, and a runner often sits inside a cluster: without a guard, a URL could read the cloud's
metadata service or a neighbor's dashboard. The guard checks the address that a socket really connects to, not the text
of the URL: `http://0x7f.1/`, a redirect, and a name that resolves differently between a check and the connection (DNS
rebinding) all arrive at `NetworkGuard.open_socket`.

An operator may vouch for a name (--allow-host). That holds for the connections of URLs with this name, and not for
others to the same address, so the guard is told whom a socket is for.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ..errors import OptionError
from .resolver import Resolver

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


_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_NAME = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\Z|0x[0-9a-f]*\Z){_LABEL}")
"""A name in lower case. One whose last label is a number is an address, at least to some (RFC 3696, section 2)."""
_MAX_QUOTED = 80
_CACHED_ADDRESSES = 16_384
_LOCAL_DOMAINS = {
    "corp",
    "home",
    "home.arpa",
    "internal",
    "intranet",
    "lan",
    "local",
    "localdomain",
    "localhost",
    "private",
}
"""Domains that are somebody's own: `metadata.google.internal` is where Google's machines have their credentials."""


class AddressRefused(OSError):
    """The guard does not allow an address.

    Args:
        address: The address that was refused.
        host: The host of the URL that led there, which may be the address itself.
    """

    def __init__(self, address: str, host: str) -> None:
        is_name = host not in ("", address)
        super().__init__(
            f"{host} resolves to {address}, which is not a public address"
            if is_name
            else f"{address} is not a public address"
        )
        self.address, self.host = address, host or address


class NetworkGuard:
    """Allows global addresses, the networks of --allow-private, and all addresses of the names of --allow-host.

    Args:
        allow_private: Networks and addresses.
        allow_host: Names, or `*.example.org` for all names below example.org.

    Raises:
        OptionError: One of these is not valid.

    >>> guard = NetworkGuard(["10.1.0.0/16"], ["*.internal"])
    >>> guard.allows("10.1.2.3"), guard.allows("10.2.2.3"), guard.allows("::ffff:127.0.0.1")
    (True, False, False)
    >>> guard.allows("10.2.2.3", "minio.internal")
    True
    """

    def __init__(self, allow_private: Iterable[str] = (), allow_host: Iterable[str] = ()) -> None:
        self._networks = [_parse_network(text) for text in allow_private]
        self._check = lru_cache(_CACHED_ADDRESSES)(self._check_address)
        self._hosts = frozenset(map(_parse_host, allow_host))

    def allows(self, address: str, host: str = "") -> bool:
        """Return whether connecting to a numeric address is allowed.

        Irregular forms (`127.1`, `2130706433`) are not: the system would interpret them in its own way.

        Args:
            address: The address.
            host: The host of the URL that led there.
        """
        is_allowed = self._check(address)
        return is_allowed is not None and (is_allowed or self.vouches_for(host))

    def open_socket(self, info: tuple[Any, ...], host: str) -> socket.socket:
        """Return a socket for a result of `getaddrinfo`.

        Args:
            info: The result.
            host: The host of the URL that it is for.

        Raises:
            AddressRefused: The guard does not allow the address.
        """
        family, kind, protocol, _, address = info
        if not self.allows(address[0], host):
            raise AddressRefused(address[0], host)
        return socket.socket(family, kind, protocol)

    def resolver(self, resolver: AbstractResolver | None = None) -> AbstractResolver:
        """Return a resolver, less the addresses that the guard does not allow. It is for the running event loop.

        `open_socket` would refuse these too. But if a host has a public and a private address, as behind a
        split-horizon DNS, only the public one is tried this way, and the error is about that one. `resolve` raises
        AddressRefused if no address is left.

        Args:
            resolver: Resolves the names; default: a `Resolver`.
        """
        return _GuardedResolver(self, Resolver() if resolver is None else resolver)

    def vouches_for(self, host: str) -> bool:
        """Return whether --allow-host has a host, so that it may have any address."""
        name = host.lower().removesuffix(".")
        if not self._hosts or not _NAME.fullmatch(name):
            return False
        labels = name.split(".")
        parents = (".".join(["*", *labels[start:]]) for start in range(1, len(labels)))
        return name in self._hosts or any(parent in self._hosts for parent in parents)

    def _check_address(self, address: str) -> bool | None:
        """Return whether an address is allowed, whoever leads there; None if it is not an address in a regular form."""
        try:
            ip = _innermost(ipaddress.ip_address(address))
        except ValueError:
            return None
        if any(ip in network for network in self._networks):
            return True
        if any(ip in network for network in _SPECIAL) or ip.is_multicast or not ip.is_global:
            return False
        return ip.version == 4 or ip in _GLOBAL_V6


class _GuardedResolver(AbstractResolver):
    def __init__(self, guard: NetworkGuard, resolver: AbstractResolver) -> None:
        self._guard, self._resolver = guard, resolver

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        addresses = await self._resolver.resolve(host, port, family)
        allowed = [address for address in addresses if self._guard.allows(address["host"], host)]
        if addresses and not allowed:
            raise AddressRefused(addresses[0]["host"], host)
        return allowed

    async def close(self) -> None:
        await self._resolver.close()


def is_name(host: str) -> bool:
    """Return whether a host is a name of letters, digits, hyphens and underscores, so that all parsers agree on it.

    >>> is_name("img_1.example.org."), is_name("127.0.0.1%2f.example.org"), is_name("8.8.8.0x8")
    (True, False, False)
    """
    return _NAME.fullmatch(host.lower().removesuffix(".")) is not None


def is_local_name(name: str) -> bool:
    """Return whether a name is one that only a local network knows: without a dot, or in a domain for such names.

    >>> is_local_name("minio"), is_local_name("metadata.google.internal"), is_local_name("images.example.org")
    (True, True, False)
    """
    labels = name.lower().removesuffix(".").split(".")
    return len(labels) == 1 or not _LOCAL_DOMAINS.isdisjoint((labels[-1], ".".join(labels[-2:])))


def _parse_network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        return ipaddress.ip_network(text.strip())
    except ValueError as error:
        raise OptionError(
            f"--allow-private: found {text!r}, expected a network such as 127.0.0.0/8 or an address: {error}"
        ) from None


def _parse_host(text: str) -> str:
    """Return a name in the form that URLs have it in: lower case, ASCII."""
    wildcard, name = ("*.", text.strip()[2:]) if text.strip().startswith("*.") else ("", text.strip())
    try:
        encoded = URL.build(scheme="http", host=name.removesuffix(".")).raw_host or ""
    except ValueError:
        encoded = ""
    if not _NAME.fullmatch(encoded):
        found = repr(text if len(text) <= _MAX_QUOTED else text[:_MAX_QUOTED] + "…")
        raise OptionError(
            f"--allow-host: found {found}, expected a name such as minio.internal, or *.example.org for all names "
            "below example.org; --allow-private takes addresses"
        )
    return wildcard + encoded


def _innermost(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address contains, or the address itself."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
