"""A forward proxy on loopback, on real sockets: it forwards requests, makes tunnels, and knows names of its own."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple
from urllib.parse import urlsplit

CHECK = "http://proxy-check.invalid/"
"""What batchvl requests to find out whether this is a proxy."""
_CHUNK_BYTES = 65536


class ProxyRequest(NamedTuple):
    """A request to the proxy."""

    method: str
    target: str
    head: bytes


class ForwardProxy:
    """The proxy, an async context manager.

    Args:
        names: Addresses and ports by host and port: what the proxy connects to instead. Other names do not exist here.
        user: User and password that it asks for, as "user:password".
    """

    def __init__(self, names: Mapping[str, tuple[str, int]] | None = None, user: str = "") -> None:
        self._names, self.user = names or {}, user
        self.requests: list[ProxyRequest] = []
        """All but those that are only to find out whether it is a proxy."""
        self.checks = 0
        self.unauthorized = "407 No"
        """Status of the answer to other credentials."""
        self.refuses: dict[str, str] = {}
        """Status of the answer to CONNECT, by host and port, instead of a tunnel."""
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> ForwardProxy:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; after `stop` at the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Refuse connections from now on, and end those that there are."""
        self._server.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def url(self, user: str = "") -> str:
        return f"http://{user}{'@' * bool(user)}127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request, or forward it."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, *fields = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, target, _ = line.split(" ")
        if target == CHECK:
            self.checks += 1
        else:
            self.requests.append(ProxyRequest(method, target, head))
        credentials = f"Proxy-Authorization: Basic {b64encode(self.user.encode()).decode()}"
        if self.user and credentials not in fields:
            writer.write(f"HTTP/1.1 {self.unauthorized}\r\nContent-Length: 0\r\n\r\n".encode())
        elif method == "CONNECT":
            await self._tunnel(target, reader, writer)
        else:
            await self._forward(target, fields, writer)
        with suppress(OSError):
            await writer.drain()

    async def _tunnel(self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        status = self.refuses.get(target)
        upstream = None if status else await self._connect(target)
        if upstream is None:
            writer.write(f"HTTP/1.1 {status or '502 No such host'}\r\nContent-Length: 0\r\n\r\n".encode())
            return
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        try:
            await asyncio.gather(_copy(reader, upstream[1]), _copy(upstream[0], writer))
        finally:
            upstream[1].close()

    async def _forward(self, target: str, fields: list[str], writer: asyncio.StreamWriter) -> None:
        url = urlsplit(target)
        upstream = await self._connect(url.netloc if url.port else f"{url.netloc}:80")
        if upstream is None:
            writer.write(b"HTTP/1.1 502 No such host\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            return
        ours = ("proxy-", "connection:")
        kept = [field for field in fields if not field.lower().startswith(ours)]
        path = target.removeprefix(f"{url.scheme}://{url.netloc}")
        upstream[1].write("\r\n".join([f"GET {path} HTTP/1.1", *kept, "Connection: close", "", ""]).encode("latin-1"))
        try:
            await _copy(upstream[0], writer)
        finally:
            upstream[1].close()

    async def _connect(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        host, _, port = name.rpartition(":")
        address = self._names.get(name) or ((host, int(port)) if host.replace(".", "").isdigit() else None)
        try:
            return None if address is None else await asyncio.open_connection(*address)
        except OSError:
            return None


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy bytes until the end of one side, and end the other."""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
    finally:
        writer.close()
