"""What is said to an HTTP proxy itself: tunnels to hosts (RFC 9110, section 9.3.6), and a check that it is one."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus

from ...config.units import Proxy
from ..urls import Target, parse_url
from .errors import HttpError, ProtocolError, ProxyError, ProxyRefused
from .head import authority, encode_request
from .parser import ResponseParser

_RECEIVED_BYTES = 4096
_NOWHERE = parse_url("http://proxy-check.invalid/")
"""A host that does not exist (RFC 2606, section 2), so that every answer is the proxy's own."""
NOT_ACCEPTED = {HTTPStatus.PROXY_AUTHENTICATION_REQUIRED, HTTPStatus.UNAUTHORIZED}
"""Answers to a wrong user or password; tinyproxy says 401."""


def proxy_headers(proxy: Proxy) -> list[tuple[str, str]]:
    """Return the headers that only a proxy gets: its user and password, if there are any."""
    return [] if proxy.authorization is None else [("Proxy-Authorization", proxy.authorization)]


async def check_proxy(sock: socket.socket, proxy: Proxy) -> None:
    """Let a proxy answer a request.

    Args:
        sock: A connection to the proxy.
        proxy: The proxy.

    Raises:
        ProxyError: It does not answer in HTTP, or does not accept its user and password.
    """
    headers = [*proxy_headers(proxy), ("Connection", "close")]
    try:
        status, _ = await _ask(sock, encode_request(_NOWHERE, headers, to_proxy=True))
    except (HttpError, OSError) as error:
        raise ProxyError(str(proxy), "does not answer as an HTTP proxy does") from error
    if status in NOT_ACCEPTED:
        what = (
            "asks for a user and a password" if proxy.authorization is None else "does not accept its user and password"
        )
        raise ProxyError(str(proxy), f"{what} (HTTP status {status})")


async def open_tunnel(sock: socket.socket, target: Target, proxy: Proxy) -> None:
    """Ask a proxy to connect to a host, which speaks only once it is spoken to.

    Args:
        sock: A connection to the proxy.
        target: What is requested from the host.
        proxy: The proxy.

    Raises:
        ProxyRefused: It does not connect to the host.
        Disconnected, ProtocolError, OSError: It breaks the connection, or does not answer in HTTP.
    """
    name = authority(target, with_port=True)
    fields = "".join(f"{header}: {value}\r\n" for header, value in proxy_headers(proxy))
    status, body = await _ask(sock, f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n{fields}\r\n".encode())
    if not 200 <= status < 300:
        raise ProxyRefused(status)
    if body:
        raise ProtocolError("the proxy sends more than its answer")


async def _ask(sock: socket.socket, request: bytes) -> tuple[int, memoryview]:
    """Send a request, and return the status of the response, and what has arrived with its head."""
    loop, parser = asyncio.get_running_loop(), ResponseParser()
    await loop.sock_sendall(sock, request)
    while parser.head is None:
        if data := await loop.sock_recv(sock, _RECEIVED_BYTES):
            parser.feed(memoryview(data))
        else:
            parser.feed_end(None)
    return parser.head.status, parser.take_body()
