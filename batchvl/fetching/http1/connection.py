"""One HTTP/1.1 connection, and the response that arrives on it."""

from __future__ import annotations

import asyncio
import socket
from types import TracebackType
from typing import TYPE_CHECKING, cast

from multidict import CIMultiDictProxy

from .errors import Disconnected, HttpError, IncompleteBody, ProtocolError
from .head import Head
from .parser import ResponseParser

if TYPE_CHECKING:
    from .connections import Connections

_MAX_UNREAD_BYTES = 256 * 1024

Key = tuple[str, str, int]
"""Whom a connection is for: scheme, host and port."""


class Response:
    """A response: its header at first, and its body as it arrives.

    Iterate over it for the body, in pieces. It is a context manager; when it is closed before the whole body has
    arrived, so is its connection.
    """

    __slots__ = ("_connection", "_error", "_parser", "_waiter", "codings", "content_length", "headers", "status")

    status: int
    headers: CIMultiDictProxy[str]
    """Names in any case. Values are UTF-8; other bytes are surrogate escapes."""
    codings: str
    """How the body is encoded: Content-Encoding, and what Transfer-Encoding says besides chunks, in this order."""
    content_length: int | None
    """Bytes of the body as it is sent, if the header says so; `MAX_LENGTH` for anything larger."""

    def __init__(self, connection: Connection, parser: ResponseParser) -> None:
        self._connection: Connection | None = connection
        """None once there is nothing more to come."""
        self._parser = parser
        self._error: HttpError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Response:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the rest of the body."""
        connection, self._connection = self._connection, None
        self._parser.take_body()
        if connection is not None:
            connection.abort()

    def __aiter__(self) -> Response:
        return self

    async def __anext__(self) -> memoryview:
        """Return the next piece of the body, which is the caller's.

        Raises:
            IncompleteBody: The connection ended before the body did.
            ProtocolError: The body is not delimited in a valid way.
        """
        while not self._parser.body:
            if self._connection is None:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._wait()
        body = self._parser.take_body()
        if self._connection is not None:
            self._connection.resume()
        return body

    async def wait_for_head(self) -> None:
        """Wait for status and header. Raises Disconnected or ProtocolError."""
        while self._parser.head is None:
            if self._connection is None:
                raise self._error or Disconnected(None, has_begun=self._parser.has_begun)
            await self._wait()
        head: Head = self._parser.head
        self.status, self.headers = head.status, head.headers
        self.codings, self.content_length = head.codings, head.content_length

    def notify(self) -> None:
        """Wake who waits: something has arrived."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def end(self, error: HttpError | None) -> None:
        """Take note that nothing more will come, because the response is complete or of an error."""
        self._connection, self._error = None, error
        self.notify()

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Connection(asyncio.BufferedProtocol):
    """One connection, on which one request is in progress at most.

    Args:
        pool: Where it goes when it is idle.
        key: Whom it is connected to.
    """

    __slots__ = ("_closes", "_is_paused", "_parser", "_pool", "_response", "_transport", "key", "sock")

    sock: socket.socket
    """Owned by the transport."""

    def __init__(self, pool: Connections, key: Key) -> None:
        self._pool, self.key = pool, key
        self._transport: asyncio.Transport | None = None
        self._parser: ResponseParser | None = None
        self._response: Response | None = None
        self._closes = self._is_paused = False

    async def exchange(self, request: bytes, *, close: bool) -> Response:
        """Send a request, and return its response once the header has arrived.

        Args:
            request: The request.
            close: Whether the connection is to be closed afterwards.
        """
        self._closes = close
        self._parser = ResponseParser()
        self._response = response = Response(self, self._parser)
        if self._transport is None:
            response.end(Disconnected(None, has_begun=False))
        else:
            self._transport.write(request)
        try:
            await response.wait_for_head()
        except BaseException:
            self.abort()
            raise
        return response

    def is_silent(self) -> bool:
        """Return whether it is open, and nothing has arrived that the event loop has not yet seen."""
        if self._transport is None or self._transport.is_closing():
            return False
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def resume(self) -> None:
        """Receive again, if there was no room for more."""
        if self._is_paused and self._transport is not None:
            self._is_paused = False
            self._transport.resume_reading()

    def break_off(self) -> None:
        """Close it at once; a request in progress fails."""
        self._end_of_stream(ConnectionAbortedError("the client was closed"))

    def abort(self) -> None:
        """Close it at once; nobody waits for it."""
        self._parser = self._response = None
        self._pool.discard(self)
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not derived from it
        self._pool.add(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.buffer

    def buffer_updated(self, nbytes: int) -> None:
        parser, response = self._parser, self._response
        if parser is None or response is None:
            self.abort()  # nobody has asked
            return
        try:
            parser.feed(self._pool.buffer[:nbytes])
        except ProtocolError as error:
            self._end(error)
            return
        if parser.is_complete:
            self._end(None)
            return
        if len(parser.body) > _MAX_UNREAD_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        response.notify()

    def eof_received(self) -> bool:
        self._end_of_stream(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._end_of_stream(
            exc if exc is None or isinstance(exc, OSError) else ConnectionAbortedError(type(exc).__name__)
        )
        self._pool.remove(self)

    def _end_of_stream(self, error: OSError | None) -> None:
        if self._parser is None:
            self.abort()
            return
        try:
            self._parser.feed_end(error)
        except (Disconnected, IncompleteBody) as failure:
            self._end(failure)
        else:
            self._end(None)

    def _end(self, error: HttpError | None) -> None:
        """End the exchange; the connection stays open if it can be used again."""
        parser, response = self._parser, self._response
        assert parser is not None
        assert response is not None
        if error is None and parser.is_reusable and not self._closes:
            self._parser = self._response = None
            self.resume()
            self._pool.keep(self)
        else:
            self.abort()
        response.end(error)
