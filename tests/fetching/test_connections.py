"""Requests over real sockets: connections that are used again, and those that must not be."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult

from batchvl.config.units import Proxy as ProxyAddress
from batchvl.errors import EmptyImage, PrepareError, row_errors
from batchvl.fetching.http1.connection import Connection, Response
from batchvl.fetching.http1.connections import Connections
from batchvl.fetching.http1.errors import (
    ConnectError,
    ConnectTimeout,
    Disconnected,
    DnsError,
    HttpError,
    IncompleteBody,
    ProtocolError,
    ProxyRefused,
    TlsError,
)
from batchvl.fetching.network import AddressRefused, NetworkGuard
from batchvl.fetching.resolver import Resolver
from batchvl.fetching.urls import parse_url
from tests.faults.open_web import FAULTS, MAX_IMAGE_BYTES, Fault, OpenWeb
from tests.faults.open_web.certificates import make_contexts
from tests.faults.open_web.messages import CHUNKED, DECOY, IMAGE, LAST_CHUNK, answer, chunk, head, length
from tests.timing import scaled

MEGABYTE = 2**20
HEADERS = [("User-Agent", "batchvl"), ("Accept-Encoding", "gzip")]

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The server's end of a connection."""

    def __init__(self, server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.server, self.reader, self.writer = server, reader, writer
        self.number = server.connections
        """Of the connection, from 1."""

    async def request(self) -> bytes:
        """Return the next request."""
        data = await self.reader.readuntil(b"\r\n\r\n")
        self.server.requests.append(data)
        return data

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def wait_for_close(self) -> None:
        """Wait until the client has closed the connection."""
        while await self.reader.read(MEGABYTE):
            pass


class Server:
    """A server, on all loopback addresses by default, whose connections each follow a script."""

    def __init__(
        self, script: Script, context: ssl.SSLContext | None = None, address: tuple[str, int] = ("0.0.0.0", 0)
    ) -> None:
        self._script, self._context, self._address = script, context, address
        self.requests: list[bytes] = []
        self.connections = 0
        self.closed = asyncio.Queue[int]()
        """Numbers of connections whose scripts have ended."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Server:
        self._server = await asyncio.start_server(self._serve, *self._address, ssl=self._context, limit=MEGABYTE)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{'http' if self._context is None else 'https'}://{host}:{self.port}{path}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        peer = Peer(self, reader, writer)
        try:
            await self._script(peer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()
            self.closed.put_nowait(peer.number)


def always(data: bytes) -> Script:
    """Return the script that answers every request with this."""

    async def script(peer: Peer) -> None:
        while True:
            await peer.request()
            await peer.send(data)

    return script


def connections(**options: Any) -> Connections:
    """Return connections to loopback addresses."""
    guard = options.pop("guard", NetworkGuard(["127.0.0.0/8"]))
    resolver = options.pop("resolver", None) or Resolver()
    defaults = {"connect_timeout": scaled(30), "keep_alive": scaled(60), "max_idle": 100}
    return Connections(guard, resolver, **(defaults | options))


async def get(client: Connections, url: str, **options: Any) -> bytes:
    with await client.request(parse_url(url), HEADERS, **options) as response:
        return await read(response)


async def read(response: Response) -> bytes:
    return b"".join([bytes(piece) async for piece in response])


Contexts = dict[str, ssl.SSLContext]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Contexts]:
    return make_contexts(tmp_path_factory.mktemp("certificates"), ["127.0.0.1"])


@pytest.fixture
def authority(certificates: tuple[Path, Contexts]) -> Path:
    return certificates[0]


@pytest.fixture
def contexts(certificates: tuple[Path, Contexts]) -> Contexts:
    return certificates[1]


def open_files() -> set[str]:
    """Return what the file descriptors of this process stand for."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


async def test_the_request_and_its_response() -> None:
    async with Server(always(answer("X-Note: käse"))) as server, connections() as client:
        with await client.request(parse_url(server.url("/a%2f?b")), HEADERS) as response:
            assert (response.status, response.content_length, response.codings) == (200, len(IMAGE), "")
            assert response.headers["x-note"] == "käse"
            assert await read(response) == IMAGE
            assert await read(response) == b""
        host = f"Host: 127.0.0.1:{server.port}".encode()
        assert server.requests == [
            b"GET /a%2f?b HTTP/1.1\r\n" + host + b"\r\nUser-Agent: batchvl\r\nAccept-Encoding: gzip\r\n\r\n"
        ]


async def test_a_connection_is_used_again_for_the_same_host() -> None:
    async with Server(always(answer())) as server, connections() as client:
        for _ in range(3):
            assert await get(client, server.url()) == IMAGE
        assert server.connections == 1
        await get(client, server.url(host="127.0.0.2"))
        assert server.connections == 2


async def test_a_connection_serves_one_request_at_a_time() -> None:
    async with Server(always(answer())) as server, connections() as client:
        assert await asyncio.gather(*(get(client, server.url()) for _ in range(20))) == [IMAGE] * 20
        assert server.connections == 20
        await asyncio.gather(*(get(client, server.url()) for _ in range(20)))
        assert server.connections == 20


async def test_a_response_that_has_arrived_need_not_be_read() -> None:
    async with Server(always(answer(status="404 Not Found"))) as server, connections() as client:
        for _ in range(3):
            with await client.request(parse_url(server.url()), HEADERS) as response:
                assert response.status == 404
        assert server.connections == 1


async def test_a_connection_is_closed_if_the_client_wants_it() -> None:
    async with Server(always(answer())) as server, connections() as client:
        await get(client, server.url(), close=True)
        assert await server.closed.get() == 1
        assert b"\r\nConnection: close\r\n" in server.requests[0]


@pytest.mark.parametrize(
    "data",
    [
        answer("Connection: close"),
        answer(version="HTTP/1.0"),
        answer() + answer(body=DECOY),
        answer() + b"\r\n",
        head(CHUNKED) + chunk(IMAGE) + LAST_CHUNK + answer(body=DECOY),
        head(CHUNKED, length(IMAGE)) + chunk(IMAGE) + LAST_CHUNK,
        head(status="304 Not Modified") + answer(body=DECOY),
    ],
)
async def test_a_connection_is_closed_after_what_is_ambiguous_or_too_much(data: bytes) -> None:
    async with Server(always(data)) as server, connections() as client:
        for number in (1, 2):
            assert await get(client, server.url()) in (IMAGE, b"")
            assert await server.closed.get() == number


async def test_a_response_that_is_closed_early_closes_the_connection() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer()[:-1])
        await peer.wait_for_close()

    async with Server(script) as server, connections() as client:
        with await client.request(parse_url(server.url()), HEADERS) as response:
            assert bytes(await anext(response)) == IMAGE[:-1]
        assert await server.closed.get() == 1


async def test_a_request_that_is_cancelled_closes_its_connection() -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.wait_for_close()

    async with Server(script) as server, connections() as client:
        task = asyncio.create_task(get(client, server.url()))
        await asked.wait()
        task.cancel()
        assert await server.closed.get() == 1
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_what_arrives_on_an_idle_connection_closes_it() -> None:
    """The attack: an image that nobody asked for, to be taken for the answer to the next request."""
    asked, send_decoy = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer())
        if peer.number == 1:
            await send_decoy.wait()
            await peer.send(answer(body=DECOY))
            await peer.wait_for_close()
            asked.set()

    async with Server(script) as server, connections() as client:
        assert await get(client, server.url()) == IMAGE
        send_decoy.set()
        await asked.wait()
        assert await get(client, server.url()) == IMAGE
        assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.parametrize("is_closed", [False, True])
async def test_what_the_event_loop_has_not_yet_seen_on_an_idle_connection(is_closed: bool) -> None:
    """The decoy, or the end of the connection, is in the socket, but the loop has had no chance to read it."""
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        async with connections() as client:
            fetching = asyncio.create_task(get(client, url))
            first, _ = await loop.sock_accept(listener)
            with first:
                await loop.sock_recv(first, 1000)
                await loop.sock_sendall(first, answer())
                assert await fetching == IMAGE
                if is_closed:
                    first.shutdown(socket.SHUT_WR)
                else:
                    first.send(answer(body=DECOY))
                fetching = asyncio.create_task(get(client, url))
                second, _ = await loop.sock_accept(listener)
                with second:
                    await loop.sock_recv(second, 1000)
                    await loop.sock_sendall(second, answer())
                    assert await fetching == IMAGE


async def test_a_kept_connection_that_breaks_is_replaced_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number <= 2:
            await peer.send(answer())
            await peer.request()

    async with Server(script) as server, connections() as client:
        assert await get(client, server.url()) == IMAGE
        assert await get(client, server.url()) == IMAGE
        assert (server.connections, len(server.requests)) == (2, 3)
        with pytest.raises(Disconnected):  # this time, the new one breaks too
            await get(client, server.url())
        assert (server.connections, len(server.requests)) == (3, 5)


async def test_a_kept_connection_that_breaks_within_a_response_is_not_replaced() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(answer())
        await peer.request()
        await peer.send(b"HTTP/1.1 2")

    async with Server(script) as server, connections() as client:
        assert await get(client, server.url()) == IMAGE
        with pytest.raises(Disconnected):
            await get(client, server.url())
        assert len(server.requests) == 2


async def test_connections_are_kept_for_a_while() -> None:
    async with Server(always(answer())) as server, connections(keep_alive=0.1) as client:
        await get(client, server.url(host="127.0.0.1"))
        await asyncio.sleep(0.05)
        await get(client, server.url(host="127.0.0.2"))  # idle later than the first one
        assert [await server.closed.get() for _ in range(2)] == [1, 2]


async def test_the_connection_that_was_idle_for_longest_is_closed_first() -> None:
    async with Server(always(answer())) as server, connections(max_idle=2) as client:
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1", "127.0.0.3"):
            await get(client, server.url(host=host))
        assert await server.closed.get() == 2
        assert server.closed.empty()


async def test_an_endless_body_that_nobody_reads_takes_bounded_memory() -> None:
    total = 64 * MEGABYTE
    sent = 0

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(head(f"Content-Length: {total}"))
        while sent < total:
            await peer.send(bytes(MEGABYTE))
            sent += MEGABYTE

    async with Server(script) as server, connections() as client:
        with await client.request(parse_url(server.url()), HEADERS) as response:
            before = -1
            while before < sent:  # until the server is stuck
                before = sent
                await asyncio.sleep(0.2)
            assert sent < total / 2  # it is in the kernel's buffers
            sizes = [len(piece) async for piece in response]
        assert sum(sizes) == total
        assert max(sizes) <= 512 * 1024
        assert await server.closed.get() == 1


@pytest.mark.parametrize(
    ("data", "error", "partial"),
    [
        (b"", Disconnected, None),
        (answer()[:20], Disconnected, None),
        (b"SSH-2.0", ProtocolError, None),
        (answer()[:-1], IncompleteBody, IMAGE[:-1]),
        (head(CHUNKED) + chunk(IMAGE) + b"x", ProtocolError, IMAGE),
        (head(CHUNKED) + chunk(IMAGE), IncompleteBody, IMAGE),
    ],
)
async def test_errors(data: bytes, error: type[HttpError], partial: bytes | None) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(data + (b"\r\n\r\n" if data.endswith(b"x") else b""))

    received = bytearray()

    async def receive() -> None:
        with await client.request(parse_url(server.url()), HEADERS) as response:
            async for piece in response:
                received.extend(piece)

    async with Server(script) as server, connections() as client:
        with pytest.raises(error) as caught:
            await receive()
        assert received == (partial or b"")
        assert len(str(caught.value)) < 100


async def test_garbage_is_an_error_at_once() -> None:
    """Without waiting for more: the server sends no more, and does not close."""

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"SSH-2.0")
        await peer.wait_for_close()

    async with Server(script) as server, connections() as client:
        with pytest.raises(ProtocolError):
            await get(client, server.url())
        assert await server.closed.get() == 1


async def test_closing_ends_requests_in_progress_and_all_connections() -> None:
    headed = asyncio.Event()

    async def script(peer: Peer) -> None:
        request = await peer.request()
        if b"/idle" in request:
            await peer.send(answer())
        elif b"/body" in request:
            await peer.send(head("Content-Type: image/jpeg"))
        else:
            headed.set()
        await peer.wait_for_close()

    before = open_files()
    async with Server(script) as server, connections() as client:
        await get(client, server.url("/idle"))
        response = await client.request(parse_url(server.url("/body", "127.0.0.2")), HEADERS)
        reading = asyncio.create_task(read(response))
        waiting = asyncio.create_task(get(client, server.url("/head", "127.0.0.3")))
        await headed.wait()
        await client.close()
        with pytest.raises(IncompleteBody):
            await reading
        with pytest.raises(Disconnected):
            await waiting
        assert {await server.closed.get() for _ in range(3)} == {1, 2, 3}
    await asyncio.sleep(0)
    assert {name for name in open_files() - before if "socket" in name} == set()


async def test_neither_responses_nor_connections_are_in_reference_cycles() -> None:
    async with Server(always(answer())) as server:
        gc.collect()
        gc.disable()
        try:
            async with connections() as client:
                await get(client, server.url())
                await get(client, server.url())
                response = await client.request(parse_url(server.url(host="127.0.0.2")), HEADERS)
                response.close()
                del response
                assert not [found for found in gc.get_objects() if type(found) is Response]
            assert not [found for found in gc.get_objects() if type(found) is Connection]
        finally:
            gc.enable()


@pytest.mark.parametrize("tls", [False, True])
async def test_cancellation_at_any_step_leaves_nothing_open(tls: bool, authority: Path, contexts: Contexts) -> None:
    trusting = ssl.create_default_context(cafile=str(authority))
    async with Server(always(answer()), contexts["valid"] if tls else None) as server:
        before, steps, is_cancelled = open_files(), 0, True
        while is_cancelled:
            async with connections(ssl_context=trusting) as client:
                task = asyncio.create_task(get(client, server.url()))
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                is_cancelled = task.cancelled()
            while open_files() - before:  # until the server has closed its ends too
                await asyncio.sleep(0)
            steps += 1
        assert await task == IMAGE
        assert steps > 5


async def test_tls(authority: Path, contexts: Contexts) -> None:
    trusting = ssl.create_default_context(cafile=str(authority))
    async with Server(always(answer()), contexts["valid"]) as server, connections(ssl_context=trusting) as client:
        for _ in range(3):
            assert await get(client, server.url()) == IMAGE
        assert server.connections == 1


@pytest.mark.parametrize("kind", ["wrong_name", "expired", "self_signed", "unknown_authority"])
async def test_a_certificate_that_is_not_trusted(kind: str, authority: Path, contexts: Contexts) -> None:
    trusting = ssl.create_default_context(cafile=str(authority))
    async with Server(always(answer()), contexts[kind]) as server, connections(ssl_context=trusting) as client:
        with pytest.raises(TlsError) as caught:
            await get(client, server.url())
        assert caught.value.is_certificate
        assert not server.requests


async def test_tls_where_there_is_none() -> None:
    async def script(peer: Peer) -> None:
        await peer.send(answer(status="400 Bad Request"))
        await peer.wait_for_close()

    async with Server(script) as server, connections() as client:
        with pytest.raises(TlsError) as caught:
            await get(client, server.url().replace("http:", "https:"))
        assert not caught.value.is_certificate
        assert await server.closed.get() == 1


async def test_a_host_that_does_not_answer_to_tls() -> None:
    async with Server(Peer.wait_for_close) as server, connections(connect_timeout=scaled(0.3)) as client:
        with pytest.raises(ConnectTimeout) as caught:
            await get(client, server.url().replace("http:", "https:"))
        assert caught.value.stage == "TLS"
        assert await server.closed.get() == 1


async def test_a_host_that_does_not_answer_to_tcp(tmp_path: Path) -> None:
    async with OpenWeb(tmp_path) as web, connections(connect_timeout=scaled(0.3)) as client:
        with pytest.raises(ConnectTimeout) as caught:
            await get(client, web.urls(FAULTS["connection_never_accepted"])[0])
        assert caught.value.stage == "TCP"


async def test_a_host_that_refuses() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with connections() as client:
            with pytest.raises(ConnectError, match=r"^cannot connect: Connection refused$"):
                await get(client, f"http://127.0.0.1:{sock.getsockname()[1]}/")


class Names(AbstractResolver):
    """Resolves names by a table."""

    def __init__(self, **addresses: list[str]) -> None:
        self._addresses = addresses
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: int = socket.AF_INET) -> list[ResolveResult]:
        self.asked.append(host)
        if host not in self._addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=kind, proto=socket.IPPROTO_TCP, flags=0)
            for address in self._addresses[host]
            for kind in [socket.AF_INET6 if ":" in address else socket.AF_INET]
        ]

    async def close(self) -> None:
        pass


async def test_a_name_without_an_address() -> None:
    async with connections(resolver=Names()) as client:
        with pytest.raises(DnsError, match=r"^nowhere: no such name$") as caught:
            await get(client, "http://nowhere/")
        assert caught.value.os_error.errno == socket.EAI_NONAME


@pytest.mark.parametrize("host", ["2130706433", "127.1", "0177.0.0.1", "127.0.0.1."])
async def test_an_address_in_an_irregular_form(host: str) -> None:
    async with connections() as client:
        with pytest.raises(ValueError):
            await get(client, f"http://{host}/")


async def test_the_guard_sees_what_is_connected_to() -> None:
    """Not only what a resolver says."""

    class Unfiltered(NetworkGuard):
        def resolver(self, resolver: AbstractResolver | None = None) -> AbstractResolver:
            assert resolver is not None
            return resolver

    async with Server(always(answer())) as server, connections(guard=Unfiltered()) as client:
        with pytest.raises(AddressRefused):
            await get(client, server.url())
        assert not server.connections


@pytest.mark.parametrize("host", ["127.0.0.1", "private", "mixed", "0x7f.1", "[::1]"])
async def test_the_guard_sees_each_address(host: str) -> None:
    names = Names(private=["127.0.0.1", "127.0.0.2"], mixed=["127.0.0.1", "::1"])
    resolver = names if host in ("private", "mixed") else Resolver()
    async with Server(always(answer())) as server, connections(guard=NetworkGuard(), resolver=resolver) as client:
        with pytest.raises(AddressRefused) as caught:
            await get(client, server.url(host=host))
        assert caught.value.host == host.strip("[]")
        assert not server.connections


async def test_a_host_that_the_operator_vouches_for() -> None:
    names = Names(vouched=["127.0.0.1"], other=["127.0.0.1"])
    guard = NetworkGuard([], ["vouched"])
    async with Server(always(answer())) as server, connections(guard=guard, resolver=names) as client:
        assert await get(client, server.url(host="vouched")) == IMAGE
        with pytest.raises(AddressRefused):
            await get(client, server.url(host="other"))


@pytest.mark.parametrize("first", ["::1", "127.0.0.9"])
async def test_the_next_address_is_tried_if_one_fails_or_is_silent(first: str) -> None:
    """Nothing listens at ::1, and what listens at 127.0.0.9 drops who wants to connect."""
    names = Names(two=[first, "127.0.0.1"])
    guard = NetworkGuard(["127.0.0.0/8", "::1"])
    with socket.create_server(("127.0.0.9", 0), backlog=0) as silent, contextlib.ExitStack() as waiting:
        port = silent.getsockname()[1]
        for _ in range(3):
            sock = waiting.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.9", port))
        async with (
            Server(always(answer()), address=("127.0.0.1", port)) as server,
            connections(guard=guard, resolver=names) as client,
        ):
            assert await get(client, server.url(host="two")) == IMAGE


class Proxy(Server):
    """A proxy that sends all requests and tunnels to `to`, a port, or refuses them with a status."""

    def __init__(self, to: int, status: str = "200 OK") -> None:
        super().__init__(self._forward)
        self._to, self._status = to, status

    async def _forward(self, peer: Peer) -> None:
        request = await peer.request()
        if not self._status.startswith("200"):
            await peer.send(answer(status=self._status))
            return
        reader, writer = await asyncio.open_connection("127.0.0.1", self._to)
        try:
            if request.startswith(b"CONNECT"):
                await peer.send(head(status=self._status))
            else:
                writer.write(request)
            await asyncio.gather(self._copy(peer.reader, writer), self._copy(reader, peer.writer))
        finally:
            writer.close()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
        writer.close()


async def test_a_proxy_for_http() -> None:
    """The guard allows nothing here, but the proxy is the operator's choice."""
    async with Server(always(answer())) as server, Proxy(server.port) as proxy:
        url = ProxyAddress.parse(f"http://me:pw@127.0.0.1:{proxy.port}")
        async with connections(
            guard=NetworkGuard(), proxy=url, resolver=Names(**{"127.0.0.1": ["127.0.0.1"]})
        ) as client:
            for _ in range(2):
                assert await get(client, "http://images.example:8080/a%2f?b") == IMAGE
        assert proxy.connections == 1
        assert server.requests[0].startswith(
            b"GET http://images.example:8080/a%2f?b HTTP/1.1\r\nHost: images.example:8080\r\n"
        )
        assert b"\r\nProxy-Authorization: Basic bWU6cHc=\r\n" in server.requests[0]


async def test_a_proxy_for_https(authority: Path, contexts: Contexts) -> None:
    trusting = ssl.create_default_context(cafile=str(authority))
    async with Server(always(answer()), contexts["valid"]) as server, Proxy(server.port) as proxy:
        url = ProxyAddress.parse(f"http://me:pw@127.0.0.1:{proxy.port}")
        async with connections(ssl_context=trusting, proxy=url) as client:
            for _ in range(2):
                assert await get(client, "https://127.0.0.1:4433/") == IMAGE
        assert proxy.requests == [
            b"CONNECT 127.0.0.1:4433 HTTP/1.1\r\nHost: 127.0.0.1:4433\r\nProxy-Authorization: Basic bWU6cHc=\r\n\r\n"
        ]
        assert b"Proxy-Authorization" not in server.requests[0]


async def test_a_proxy_that_refuses() -> None:
    names = Names(**{"127.0.0.1": ["127.0.0.1"]})
    async with (
        Proxy(0, "403 Forbidden") as proxy,
        connections(proxy=ProxyAddress("127.0.0.1", proxy.port), resolver=names) as client,
    ):
        with pytest.raises(ProxyRefused) as caught:
            await get(client, "https://images.example/")
        assert caught.value.status == 403
        assert await proxy.closed.get() == 1


async def test_a_proxy_is_not_asked_for_addresses_that_the_guard_refuses() -> None:
    async with Proxy(0) as proxy:
        async with connections(guard=NetworkGuard(), proxy=ProxyAddress("127.0.0.1", proxy.port)) as client:
            for url in ("http://127.0.0.1/", "https://169.254.169.254/", "http://0x7f.1/", "http://[::1]/"):
                with pytest.raises((AddressRefused, ValueError)):
                    await get(client, url)
        assert not proxy.connections


DELIVERED = {"ok", EmptyImage.code} | {error.code for error in row_errors() if issubclass(error, PrepareError)}
"""Verdicts on rows for which a body arrived, of whatever content."""
NOT_HERE = ("coding_", "redirect", "robots_", "url_", "password", "another_image_while_idle")
"""Beginnings of the names of faults in what is not decided here."""


async def test_every_fault_gets_its_verdict(tmp_path: Path) -> None:
    async with OpenWeb(tmp_path) as web:
        trusting = ssl.create_default_context(cafile=str(web.authority))
        async with connections(ssl_context=trusting) as client:
            faults = [fault for fault in FAULTS.values() if not fault.name.startswith(NOT_HERE)]
            verdicts = await asyncio.gather(*(verdicts_of(client, web, fault) for fault in faults))
    expected = {fault.name: "ok" if fault.expected in DELIVERED else fault.expected for fault in faults}
    lines = [
        f"{fault.name}: {found}, not {expected[fault.name]}"
        for fault, rows in zip(faults, verdicts, strict=True)
        for found in rows
        if found != expected[fault.name]
    ]
    assert not lines, "\n" + "\n".join(lines)


async def verdicts_of(client: Connections, web: OpenWeb, fault: Fault) -> list[str]:
    """Return the verdict on each row of a fault, at its last attempt if it is one that needs several."""
    verdicts = []
    for url in web.urls(fault):
        for _ in range(5):
            found = await verdict(client, url, fault)
            if found == "ok" or fault.expected != "ok":
                break
        verdicts.append(found)
    return verdicts


async def verdict(client: Connections, url: str, fault: Fault) -> str:
    try:
        async with asyncio.timeout(scaled(2)):
            with await client.request(parse_url(url), HEADERS) as response:
                if response.status in (408, 425, 429) or response.status >= 500:
                    return "http_retryable"
                if not 200 <= response.status < 300:
                    return "http_status"
                if (response.content_length or 0) > MAX_IMAGE_BYTES:
                    return "too_many_bytes"
                body = b""
                async for piece in response:
                    body += piece
                    if len(body) > MAX_IMAGE_BYTES:
                        return "too_many_bytes"
                return "ok" if body == fault.body else "another body"
    except TimeoutError:
        return "fetch_timeout"
    except HttpError:
        return "connection_failed"
