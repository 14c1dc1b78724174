"""Messages between batchvl's processes: length-prefixed msgpack over a Unix socket.

A frame is a 4-byte little-endian length, followed by that many bytes of msgpack. Processes with an event loop use
`AsyncConnection`, the others `BlockingConnection`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec

_LENGTH = struct.Struct("<I")
Received = TypeVar("Received")


def encode_frame(message: Any, encoder: msgspec.msgpack.Encoder = msgspec.msgpack.Encoder()) -> bytes:  # noqa: B008
    """Return a message as a frame.

    >>> encode_frame([1, 2])
    b'\\x03\\x00\\x00\\x00\\x92\\x01\\x02'
    """
    body = encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class BlockingConnection(Generic[Received]):
    """One end of a socket for a process without an event loop.

    One thread may receive. Several may send if a lock serialises them.

    Args:
        sock: The socket.
        message_type: The type of received messages.
    """

    def __init__(self, sock: socket.socket, message_type: Any) -> None:
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(message_type)
        self._file = sock.makefile("rb")

    def send(self, message: Any) -> None:
        """Send a message. Blocks while the socket's buffer is full."""
        self.sock.sendall(encode_frame(message))

    def receive(self) -> Received:
        """Wait for the next message and return it.

        Raises:
            EOFError: The other end is closed.
        """
        head = self._file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise EOFError
        (length,) = _LENGTH.unpack(head)
        body = self._file.read(length)
        if len(body) < length:
            raise EOFError
        return self._decoder.decode(body)


class AsyncConnection(asyncio.Protocol, Generic[Received]):
    """One end of a socket on an event loop.

    asyncio buffers writes without a limit; the senders limit what is in flight (slots, open batches).

    Args:
        message_type: The type of received messages.
        on_message: Called with each message.
        on_lost: Called once, when the other end is closed.
    """

    def __init__(self, message_type: Any, on_message: Callable[[Received], None], on_lost: Callable[[], None]) -> None:
        self._decode = msgspec.msgpack.Decoder(message_type).decode
        self._on_message, self._on_lost = on_message, on_lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, sock: socket.socket, message_type: Any, on_message: Callable[[Received], None], on_lost: Callable[[], None]
    ) -> AsyncConnection[Received]:
        """Return a connection over `sock`, which it owns from now on. For the other arguments, see the class."""
        connection = cls(message_type, on_message, on_lost)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: connection, sock=sock)
        except BaseException:
            connection._on_lost = lambda: None  # the caller gets the exception instead
            raise
        return connection

    def send(self, message: Any) -> None:
        """Send a message. It is dropped if the other end is closed, which `on_lost` reports."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        """Close the socket once all messages are written."""
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start, size = 0, len(buffer)
        while size - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, start)
            end = start + _LENGTH.size + length
            if end > size:
                break
            message = self._decode(memoryview(buffer)[start + _LENGTH.size : end].tobytes())
            start = end
            self._on_message(message)
        del buffer[:start]

    def connection_lost(self, error: Exception | None) -> None:
        self._on_lost()
