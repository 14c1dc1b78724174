"""A web server on loopback that misbehaves on request. It uses real sockets and no mocks."""

from __future__ import annotations

import asyncio
import gzip
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from types import TracebackType

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

JUNK = bytes(range(256)) * 40
"""A body whose bytes do not matter."""


class FaultServer:
    """The server, an async context manager. `url(path)` returns the URL of one of these:

    /image/NAME          `images[NAME]`; `?length=no`: in chunks, `?wait=0.1`: delayed, `?close=1`: then closes
    /status/CODE         a response with this status
    /flaky/CODE/TIMES    this status TIMES times, then JUNK; `?after=1`: with Retry-After, `&date=1`: as a date
    /reset[/TIMES]       half a body, then a connection reset; with TIMES: JUNK after that many requests
    /short[/TIMES]       a body shorter than its Content-Length; with TIMES: as above
    /cut                 a chunked body without its end
    /drip                one byte every 20 ms
    /silent/headers      no response
    /silent/body         half a body, then nothing
    /html                an HTML page with the content type of a JPEG
    /redirect?to=URL     a redirect; `?hops=3`: after so many redirects
    /loop                a redirect to itself
    /large?bytes=N       N bytes; `&length=no`: in chunks
    /bomb?bytes=N        N zero bytes with gzip as content encoding
    /empty               an image without bytes
    /garbage             something other than HTTP
    /cookie              JUNK, and a cookie
    """

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        """Number of requests by path with query."""
        self.headers: dict[str, dict[str, str]] = {}
        """Headers of the last request by path with query."""
        self.sent = 0
        """Bytes of bodies that were handed to the sockets."""
        self.open = self.max_open = 0
        """Requests in progress, and the largest number so far."""

    async def __aenter__(self) -> FaultServer:
        app = web.Application()
        app.router.add_get("/{kind}{rest:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self.port: int = self._runner.addresses[0][1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._runner.cleanup()

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests[request.path_qs] += 1
        self.headers[request.path_qs] = dict(request.headers)
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        try:
            pieces = request.path.strip("/").split("/")
            handler: Handler = getattr(self, "_" + pieces[0], self._missing)
            return await handler(request)
        finally:
            self.open -= 1

    async def _missing(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=404)

    async def _image(self, request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(float(request.query.get("wait", 0)))
        body = self.images[request.path.split("/")[2]]
        if request.query.get("length") == "no":
            return await self._chunks(request, body)
        response = web.Response(body=body, content_type="image/jpeg")
        if "close" in request.query:
            response.force_close()
        return response

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=int(request.path.split("/")[2]), text="no")

    async def _flaky(self, request: web.Request) -> web.StreamResponse:
        _, _, code, times = request.path.split("/")
        if self.requests[request.path_qs] > int(times):
            return web.Response(body=JUNK, content_type="image/jpeg")
        headers = {}
        if after := request.query.get("after"):
            # A date has whole seconds. Round up, so that it is never in the past.
            date = formatdate(int(time.time() + float(after)) + 1, usegmt=True)
            headers["Retry-After"] = date if "date" in request.query else after
        return web.Response(status=int(code), headers=headers)

    async def _reset(self, request: web.Request) -> web.StreamResponse:
        if self._succeeds_by_now(request):
            return web.Response(body=JUNK)
        response = await self._begin(request, len(JUNK), JUNK[:5000])
        assert request.transport is not None
        sock: socket.socket = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return response

    async def _short(self, request: web.Request) -> web.StreamResponse:
        if self._succeeds_by_now(request):
            return web.Response(body=JUNK)
        return self._hang_up(request, await self._begin(request, len(JUNK), JUNK[:5000]))

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(JUNK)
        return self._hang_up(request, response)

    async def _drip(self, request: web.Request) -> web.StreamResponse:
        response = await self._begin(request, len(JUNK), b"")
        for byte in JUNK:
            await response.write(bytes([byte]))
            await asyncio.sleep(0.02)
        return response

    async def _silent(self, request: web.Request) -> web.StreamResponse:
        if request.path.endswith("/body"):
            await self._begin(request, len(JUNK), JUNK[:5000])
        await asyncio.sleep(60)
        raise AssertionError("the client waited for a minute")

    async def _html(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"<!DOCTYPE html><title>404</title>", content_type="image/jpeg")

    async def _redirect(self, request: web.Request) -> web.StreamResponse:
        hops, to = int(request.query.get("hops", 1)), request.query["to"]
        onward = request.rel_url.update_query(hops=str(hops - 1))
        return web.Response(status=302, headers={"Location": to if hops == 1 else str(onward)})

    async def _loop(self, request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": "/loop"})

    async def _large(self, request: web.Request) -> web.StreamResponse:
        body = bytes(int(request.query["bytes"]))
        if request.query.get("length") == "no":
            return await self._chunks(request, body)
        return web.Response(body=body)

    async def _bomb(self, request: web.Request) -> web.StreamResponse:
        body = gzip.compress(bytes(int(request.query["bytes"])))
        return web.Response(body=body, headers={"Content-Encoding": "gzip"})

    async def _empty(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"", content_type="image/jpeg")

    async def _garbage(self, request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
        return self._hang_up(request, web.StreamResponse())

    async def _cookie(self, request: web.Request) -> web.StreamResponse:
        response = web.Response(body=JUNK)
        response.set_cookie("seen", "before")
        return response

    def _succeeds_by_now(self, request: web.Request) -> bool:
        times = request.path.split("/")[2:]
        return bool(times) and self.requests[request.path_qs] > int(times[0])

    async def _begin(self, request: web.Request, length: int, body: bytes) -> web.StreamResponse:
        """Start a response that promises `length` bytes, and send `body`."""
        response = web.StreamResponse(headers={"Content-Length": str(length), "Content-Type": "image/jpeg"})
        await response.prepare(request)
        await response.write(body)
        await asyncio.sleep(0.01)  # until the client has received it
        return response

    async def _chunks(self, request: web.Request, body: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for start in range(0, len(body), 65536):
            await response.write(body[start : start + 65536])
            self.sent += 65536
        await response.write_eof()
        return response

    @staticmethod
    def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return response
