"""Connecting to the host of a URL: names, addresses that the guard allows, TCP, TLS, and a proxy if there is one."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Sequence
from contextlib import suppress

from aiohappyeyeballs import SocketFactoryType, start_connection
from aiohttp.abc import AbstractResolver, ResolveResult

from ...config.units import Proxy
from ..network import AddressRefused, NetworkGuard, is_local_name, is_name
from ..resolver import numeric_address
from ..urls import Target
from . import tunnel
from .errors import ConnectError, ConnectTimeout, DnsError, HttpError, ProxyError, ProxyRefused, TlsError

_HEAD_START_SECONDS = 0.25  # of an address over the next one (RFC 8305, section 5)
_LOOKUP_SECONDS = 2.0
"""For the name of a host that a proxy connects to. Where a proxy is needed, name servers often do not answer."""


class Connector:
    """Makes connections, each to an address that the guard allows. It closes the resolver with itself.

    Args:
        guard: Decides about each address. A proxy is the operator's choice and needs no permission.
        resolver: Resolves names.
        timeout: Seconds for the handshake of TCP, and again for that of TLS. Names have the deadline of the resolver.
        ssl_context: For https; default: `ssl.create_default_context()`.
        proxy: An HTTP proxy.
    """

    def __init__(
        self,
        guard: NetworkGuard,
        resolver: AbstractResolver,
        timeout: float,
        ssl_context: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._guard, self._resolver, self._timeout, self.proxy = guard, resolver, timeout, proxy
        self._guarded_resolver = guard.resolver(resolver)
        self._ssl_context = ssl_context

    async def close(self) -> None:
        """Close the resolver."""
        await self._resolver.close()

    async def check_proxy(self) -> None:
        """Check that the proxy can be connected to, answers like one, and accepts its user and password.

        Raises:
            ProxyError: It does not.
        """
        if self.proxy is None:
            return
        sock = await self._connect_to_proxy(self.proxy)
        try:
            # One that tries in vain to find a host that does not exist is a proxy, too.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._timeout):
                    await tunnel.check_proxy(sock, self.proxy)
        finally:
            sock.close()

    async def connect(self, target: Target, protocol: asyncio.BaseProtocol) -> socket.socket:
        """Connect a protocol to the host of a target, and return the socket, which the protocol's transport owns.

        Raises:
            AddressRefused: The guard allows no address of the host.
            DnsError, ConnectError, ConnectTimeout, TlsError, ProxyRefused, ProxyError, ProtocolError: As their names
                say.
            ValueError: The host is neither a name nor an address in its regular form.
        """
        check_host(target.host, through_proxy=self.proxy is not None)
        context = self._context() if target.scheme == "https" else None
        if self.proxy is None:
            sock = await self._connect_tcp(target)
        else:
            sock = await self._connect_through(self.proxy, target)
        try:
            async with asyncio.timeout(self._timeout):
                await asyncio.get_running_loop().create_connection(
                    lambda: protocol,
                    sock=sock,
                    ssl=context,
                    server_hostname=None if context is None else target.host.rstrip("."),
                )
        except TimeoutError as error:
            raise ConnectTimeout("TLS") from error
        except ssl.SSLError as error:
            raise TlsError(error) from error
        except OSError as error:
            raise ConnectError(error) from error
        return sock

    def _context(self) -> ssl.SSLContext:
        if self._ssl_context is None:
            self._ssl_context = ssl.create_default_context()
            self._ssl_context.set_alpn_protocols(["http/1.1"])
        return self._ssl_context

    async def _connect_tcp(self, target: Target) -> socket.socket:
        addresses = await _resolve(self._guarded_resolver, target.host, target.port)

        return await self._race(addresses, lambda info: self._guard.open_socket(info, target.host))

    async def _connect_through(self, proxy: Proxy, target: Target) -> socket.socket:
        """Connect to a proxy, and for https let it connect to the host."""
        await self._check_address(target)
        sock = await self._connect_to_proxy(proxy)
        if target.scheme == "https":
            try:
                async with asyncio.timeout(self._timeout):
                    await tunnel.open_tunnel(sock, target, proxy)
            except BaseException as error:
                sock.close()
                match error:
                    case ProxyRefused(status=status) if status in tunnel.NOT_ACCEPTED:
                        await self.check_proxy()  # it may ask for another user for this host alone
                    case TimeoutError():
                        raise ConnectTimeout("TCP") from error
                    case OSError():
                        raise ConnectError(error) from error
                raise
        return sock

    async def _connect_to_proxy(self, proxy: Proxy) -> socket.socket:
        try:
            addresses = await _resolve(self._resolver, proxy.host, proxy.port)
            return await self._race(addresses, lambda info: socket.socket(*info[:3]))
        except (HttpError, ValueError) as error:
            raise ProxyError(str(proxy), f"is not reached: {error}") from error

    async def _check_address(self, target: Target) -> None:
        """Raise an error unless a proxy may be asked to connect to a host.

        What it will connect to cannot be seen from here. So all addresses that are known here must be allowed. A name
        without any is left to the proxy, unless it is one of a local network, which would be the proxy's.
        """
        host = target.host
        if (address := numeric_address(host)) is not None:
            if not self._guard.allows(address, host):
                raise AddressRefused(address, host)
            return
        if self._guard.vouches_for(host):
            return
        try:
            async with asyncio.timeout(_LOOKUP_SECONDS):
                addresses = await _resolve(self._resolver, host, target.port)
        except (DnsError, TimeoutError) as error:
            if not is_local_name(host):
                return
            if isinstance(error, DnsError):
                raise
            raise DnsError(host, socket.gaierror(socket.EAI_AGAIN, f"no answer within {_LOOKUP_SECONDS:g} s")) from None
        for result in addresses:
            if not self._guard.allows(result["host"], host):
                raise AddressRefused(result["host"], host)

    async def _race(self, addresses: Sequence[ResolveResult], open_socket: SocketFactoryType) -> socket.socket:
        """Connect to the first address that answers (RFC 8305)."""
        infos = [
            (address["family"], socket.SOCK_STREAM, address["proto"], "", (address["host"], address["port"]))
            for address in addresses
        ]
        try:
            async with asyncio.timeout(self._timeout):
                return await start_connection(
                    infos, happy_eyeballs_delay=_HEAD_START_SECONDS, socket_factory=open_socket
                )
        except AddressRefused:
            raise
        except TimeoutError as error:
            raise ConnectTimeout("TCP") from error
        except OSError as error:
            raise ConnectError(error) from error


def check_host(host: str, *, through_proxy: bool = False) -> None:
    """Raise ValueError for an IPv4 address in an irregular form, such as 2130706433 or 127.1.

    No image is there, but many attempts to evade a guard are.

    Args:
        host: The host of a URL.
        through_proxy: Whether a proxy will read it, too, with a parser of its own. Then names must be regular as well.
    """
    if host.replace(".", "").isdigit():
        ipaddress.IPv4Address(host)
    elif through_proxy and ":" not in host and not is_name(host):
        raise ValueError("neither a name nor an address")


async def _resolve(resolver: AbstractResolver, host: str, port: int) -> list[ResolveResult]:
    try:
        return await resolver.resolve(host, port, socket.AF_UNSPEC)
    except socket.gaierror as error:
        raise DnsError(host, error) from error
