"""Messages between our processes: msgpack behind a length, over a Unix socket.

A frame is a 4-byte little-endian length and that many bytes of msgpack. The runner's end is an
`AsyncConnection` on its event loop; a child's end is a `BlockingConnection`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

_LENGTH = struct.Struct("<I")
Received = TypeVar("Received")


def encode_frame(message: Any, encoder: msgspec.msgpack.Encoder = msgspec.msgpack.Encoder()) -> bytes:  # noqa: B008
    """The message as it goes over the wire.

    >>> encode_frame([1, 2])
    b'\\x03\\x00\\x00\\x00\\x92\\x01\\x02'
    """
    body = encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class BlockingConnection(Generic[Received]):
    """A child's end of a socket: blocking, for one thread that reads and any that write whole frames under a lock.

    Receives messages of the type that it was made for. `receive` raises EOFError when the other end is gone.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        self.sock = sock
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(receives)
        self._file = sock.makefile("rb")

    def send(self, message: Any) -> None:
        self.sock.sendall(encode_frame(message))

    def receive(self) -> Received:
        head = self._file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise EOFError
        (length,) = _LENGTH.unpack(head)
        body = self._file.read(length)
        if len(body) < length:
            raise EOFError
        return self._decoder.decode(body)


class AsyncConnection(asyncio.Protocol, Generic[Received]):
    """The runner's end of a socket: calls `received` with each message and `lost` once when the other end is gone.

    Writes are buffered by asyncio; what is in flight is bounded by who sends (slots, lists open), not here.
    """

    def __init__(self, receives: Any, received: Callable[[Received], None], lost: Callable[[], None]) -> None:
        self._decode = msgspec.msgpack.Decoder(receives).decode
        self._received, self._lost = received, lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def open(
        cls, sock: socket.socket, receives: Any, received: Callable[[Received], None], lost: Callable[[], None]
    ) -> AsyncConnection[Received]:
        """A channel over one end of a socket pair, which it owns from now on."""
        channel = cls(receives, received, lost)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=sock)
        except BaseException:
            channel._lost = lambda: None  # who opens it hears of that, and has nothing yet that could be lost
            raise
        return channel

    def send(self, message: Any) -> None:
        """Sends a message; to a child that is gone it is lost, as `lost` tells."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        at, size = 0, len(buffer)
        while size - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer, at)
            end = at + _LENGTH.size + length
            if end > size:
                break
            message = self._decode(memoryview(buffer)[at + _LENGTH.size : end].tobytes())
            at = end
            self._received(message)
        del buffer[:at]

    def connection_lost(self, error: Exception | None) -> None:
        self._lost()
