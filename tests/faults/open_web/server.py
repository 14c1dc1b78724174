"""The server: it reads requests as bytes, and lets a fault answer them as bytes."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections import Counter
from pathlib import Path
from types import TracebackType

from .certificates import make_contexts
from .registry import FAULTS, Fault

_MAX_HEAD = 2**20
_ADDRESSES_PER_NETWORK = 250


class Exchange:
    """A request, and the connection on which to answer it."""

    def __init__(self, web: OpenWeb, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._web, self._fault, self._reader, self._writer = web, fault, reader, writer
        self.host: str = writer.get_extra_info("sockname")[0]
        """The address that was connected to."""
        self.target = ""
        """What the client asked for, as it wrote it; bytes are Latin-1."""
        self.fields: dict[str, str] = {}
        """The header of the request, names in lower case."""
        self.number = 0
        """Of the request among those for this fault and this target, from 1."""
        self.on_connection = 0
        """Of the request among those of this connection, from 1."""
        self.is_open = True

    async def read_request(self) -> bool:
        """Read the next request. Return False if the client has closed the connection."""
        try:
            data = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        request, *lines = data.decode("latin-1").split("\r\n")
        self.target = request.split(" ")[1]
        self.fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        self.on_connection += 1
        self._web.requests[self._fault.name, self.target] += 1
        self.number = self._web.requests[self._fault.name, self.target]
        return True

    async def send(self, *pieces: bytes, pause: float = 0) -> None:
        """Send bytes, each piece in a segment of its own if there is a pause after each, in seconds."""
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(pause)

    async def hang(self) -> None:
        """Wait until the client has closed the connection."""
        while await self._reader.read(65536):
            pass
        self.close()

    def close(self) -> None:
        """Close the connection, once all is sent."""
        self.is_open = False
        self._writer.close()

    async def close_without_goodbye(self) -> None:
        """Close the connection in the middle of TLS, without its closing alert."""
        await asyncio.sleep(0.05)  # until all is sent
        self.is_open = False
        self._writer.transport.abort()

    async def shut(self) -> None:
        """Close the server's half of the connection, and wait until the client closes its own."""
        self._writer.write_eof()
        await self.hang()

    async def reset(self) -> None:
        """Reset the connection."""
        await asyncio.sleep(0.05)  # until the client has read what was sent: a reset may overtake it
        self.is_open = False
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    def expand(self, template: str) -> str:
        """Fill in the addresses of this fault in the template of a URL."""
        return self._web.expand(template, self._fault)


class OpenWeb:
    """The server, an async context manager, on loopback addresses from 127.1.0.1 on.

    Args:
        directory: Where to keep certificates.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._addresses = {name: _address(1, index) for index, name in enumerate(FAULTS)}
        self._others = {name: _address(2, index) for index, name in enumerate(FAULTS)}
        self._faults = {
            address: FAULTS[name] for by_name in (self._addresses, self._others) for name, address in by_name.items()
        }
        self._connections: set[asyncio.Task[None]] = set()
        self.requests: Counter[tuple[str, str]] = Counter()
        """Number of requests by fault and target."""

    async def __aenter__(self) -> OpenWeb:
        self.authority, contexts = make_contexts(self._directory, list(self._faults))
        """File with the certificate of the authority that signed those that are valid."""
        self._servers = {kind: await self._listen(context) for kind, context in {"": None, **contexts}.items()}
        self._closed, self._full = _closed_socket(), _full_sockets()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for server in self._servers.values():
            server.close()
        for sock in (self._closed, *self._full):
            sock.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def urls(self, fault: Fault) -> list[str]:
        """Return the URL of each row of a fault."""
        url = self.expand(fault.url, fault)
        return [url] if fault.rows == 1 else [f"{url}?row={row}" for row in range(fault.rows)]

    def expand(self, template: str, fault: Fault) -> str:
        """Fill in the addresses of a fault in the template of a URL."""
        address, port = self._addresses[fault.name], _port(self._servers[fault.tls])
        places = {
            "PLAIN": f"{address}:{_port(self._servers[''])}",  # the same address without TLS
            "TLS": f"{address}:{_port(self._servers['valid'])}",  # and with it
            "HOST": f"{address}:{port}",
            "OTHER": f"{self._others[fault.name]}:{port}",
            "DECIMAL": f"{int.from_bytes(socket.inet_aton(address))}:{port}",
            "REFUSED": f"{address}:{self._closed.getsockname()[1]}",
            "STALLED": f"{address}:{self._full[0].getsockname()[1]}",
            "ADDRESS": address,
            "PORT": str(port),
        }
        for place, text in places.items():
            template = template.replace(place, text)
        return template

    async def _listen(self, context: ssl.SSLContext | None) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "0.0.0.0", 0, ssl=context, limit=_MAX_HEAD, backlog=1024)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            fault = self._faults.get(writer.get_extra_info("sockname")[0])
            if fault is None or fault.handler is None:
                return  # whoever got here has gone astray
            exchange = Exchange(self, fault, reader, writer)
            if fault.at_connect:
                await fault.handler(exchange)
            while exchange.is_open and await exchange.read_request():
                if not fault.at_connect:
                    await fault.handler(exchange)
        except (ConnectionError, TimeoutError):
            pass  # the client has had enough
        except asyncio.CancelledError:
            pass  # the server closes; asyncio would report a task that ends with this as an error
        finally:
            self._connections.discard(task)
            writer.close()


def _address(network: int, index: int) -> str:
    return f"127.{network}.{index // _ADDRESSES_PER_NETWORK}.{1 + index % _ADDRESSES_PER_NETWORK}"


def _port(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


def _closed_socket() -> socket.socket:
    """Return a socket whose port refuses connections, and that nobody else can open meanwhile."""
    sock = socket.socket()
    sock.bind(("", 0))
    return sock


def _full_sockets() -> list[socket.socket]:
    """Return a socket that never answers, since nobody accepts what is in its queue, and those in its queue."""
    listener = socket.create_server(("", 0), backlog=0)
    waiting = [socket.socket() for _ in range(3)]
    for sock in waiting:
        sock.setblocking(False)
        sock.connect_ex(("127.0.0.1", listener.getsockname()[1]))
    return [listener, *waiting]
