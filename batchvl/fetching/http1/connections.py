"""Connections to hosts, kept alive between requests, and the responses that arrive on them.

A connection in the pool is silent. A byte that arrives there, or the end of the connection, ends its use: bytes that
nobody asked for must not become the answer to the next request (response splitting).
"""

from __future__ import annotations

import asyncio
import ssl
from collections import OrderedDict
from collections.abc import Sequence
from types import TracebackType

from aiohttp.abc import AbstractResolver

from ...config.units import Proxy
from ..network import NetworkGuard
from ..urls import Target
from .connecting import Connector
from .connection import Connection, Key, Response
from .errors import Disconnected
from .head import encode_request
from .tunnel import proxy_headers

_RECEIVED_BYTES = 128 * 1024
"""Bytes that are received at once. One buffer is enough: it is emptied before another connection has its turn."""


class Connections:
    """Sends requests and keeps connections alive. An async context manager for one event loop.

    Any number of requests may be in progress: how many, and to which hosts, is for the caller to limit.

    Args:
        guard: Decides which addresses may be connected to.
        resolver: Resolves names. It is closed with the connections.
        connect_timeout: Seconds for the handshake of TCP, and again for that of TLS.
        keep_alive: Seconds for which a connection is kept without a request.
        max_idle: Connections that are kept without a request.
        ssl_context: For https; default: `ssl.create_default_context()`.
        proxy: An HTTP proxy, for all requests.
    """

    def __init__(
        self,
        guard: NetworkGuard,
        resolver: AbstractResolver,
        *,
        connect_timeout: float,
        keep_alive: float,
        max_idle: int,
        ssl_context: ssl.SSLContext | None = None,
        proxy: Proxy | None = None,
    ) -> None:
        self._connector = Connector(guard, resolver, connect_timeout, ssl_context, proxy)
        self._keep_alive, self._max_idle = keep_alive, max_idle
        self.buffer = memoryview(bytearray(_RECEIVED_BYTES))
        """Where all connections receive."""
        self._open: set[Connection] = set()
        self._idle: dict[Key, list[Connection]] = {}
        self._expiries: OrderedDict[Connection, float] = OrderedDict()
        """Of the idle connections: until when each is kept, in the order of time."""
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self._all_closed = asyncio.Event()

    async def __aenter__(self) -> Connections:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections and the resolver. Requests in progress fail with Disconnected or IncompleteBody."""
        self._is_closed = True
        for connection in list(self._open):
            connection.break_off()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._open:
            await self._all_closed.wait()
        await self._connector.close()

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used; see `Connector.check_proxy`."""
        await self._connector.check_proxy()

    async def request(self, target: Target, headers: Sequence[tuple[str, str]], *, close: bool = False) -> Response:
        """Send a GET request, and return the response once its header has arrived. It must be closed.

        If a connection that was kept alive breaks before any byte of the response, the request is sent once more.

        Args:
            target: What to request.
            headers: Names and values, besides Host.
            close: Close the connection afterwards, and let the server know.

        Raises:
            AddressRefused: The guard does not allow the host's addresses.
            HttpError: One of its subclasses: there is no response.
            ValueError: The host or a header is not valid.
        """
        proxy = self._connector.proxy
        to_proxy = proxy is not None and target.scheme == "http"
        if close:
            headers = [*headers, ("Connection", "close")]
        if proxy is not None and to_proxy:
            headers = [*headers, *proxy_headers(proxy)]
        request = encode_request(target, headers, to_proxy=to_proxy)
        key = (target.scheme, target.host, target.port)
        connection = self._take(key)
        if connection is not None:
            try:
                return await connection.exchange(request, close=close)
            except Disconnected as error:
                if error.has_begun:
                    raise
        connection = Connection(self, key)
        try:
            connection.sock = await self._connector.connect(target, connection)
        except BaseException:
            connection.abort()  # instead of a farewell by TLS, for which asyncio waits
            self.remove(connection)  # uvloop does not call connection_lost for one that has not been handed over
            raise
        return await connection.exchange(request, close=close)

    def add(self, connection: Connection) -> None:
        """Take note of an open connection."""
        self._open.add(connection)
        if self._is_closed:
            connection.break_off()

    def remove(self, connection: Connection) -> None:
        """Take note that a connection is closed."""
        self._open.discard(connection)
        if self._is_closed and not self._open:
            self._all_closed.set()

    def keep(self, connection: Connection) -> None:
        """Keep an idle connection, and close the one that has been idle for longest if there are too many."""
        loop = asyncio.get_running_loop()
        self._idle.setdefault(connection.key, []).append(connection)
        self._expiries[connection] = loop.time() + self._keep_alive
        if len(self._expiries) > self._max_idle:
            next(iter(self._expiries)).abort()
        if self._timer is None:
            self._timer = loop.call_later(self._keep_alive, self._expire)

    def discard(self, connection: Connection) -> None:
        """Take a connection out of the pool, if it is there."""
        if self._expiries.pop(connection, None) is not None:
            connections = self._idle[connection.key]
            connections.remove(connection)
            if not connections:
                del self._idle[connection.key]

    def _take(self, key: Key) -> Connection | None:
        """Return the idle connection to a host that was used last."""
        while connections := self._idle.get(key):
            connection = connections[-1]
            self.discard(connection)
            if connection.is_silent():
                return connection
            connection.abort()
        return None

    def _expire(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._expiries:
            connection, expiry = next(iter(self._expiries.items()))
            if expiry > loop.time():
                self._timer = loop.call_at(expiry, self._expire)
                return
            connection.abort()
