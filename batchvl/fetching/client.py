"""One HTTP request for an image: sent as the URL is written, received into a buffer, redirects left to the caller."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from types import TracebackType
from typing import NamedTuple

from aiohttp import CookieJar
from yarl import URL

from .._version import __version__
from ..config.options import FetchOptions
from ..errors import (
    EmptyImage,
    FetchTimeout,
    HttpStatus,
    OptedOut,
    OptionError,
    RowError,
    TooManyBytes,
    TooManyRedirects,
)
from .codings import ACCEPT_ENCODING, BodyDecoder
from .host_headers import HostHeaders
from .http import REDIRECTS, TransientError, check_status, classify, may_be_kept
from .http1.connection import Response
from .http1.connections import Connections
from .http1.errors import HttpError, ProxyError
from .image_cache import Receiver
from .network import AddressRefused, NetworkGuard
from .opt_out import opt_out_of
from .resolver import Resolver
from .sources import url_label
from .urls import Target, resolve_redirect

MAX_REDIRECTS = 5
MAX_CONNECT_SECONDS = 10.0
_KEEP_ALIVE_SECONDS = 10.0
_MAX_IDLE = 4096
"""Connections that all processes keep without a request, if they may open as many files besides those of requests."""
_MIN_IDLE = 16
_RESERVED_FILES = 512
"""Open files that are not connections."""
STALL_SECONDS = 15.0
MIN_BYTES_PER_SECOND = 1024


class SetCookie(NamedTuple):
    """A cookie that a redirect sets."""

    url: str
    """What was requested, without user and password."""
    field: bytes
    """Value of the Set-Cookie header."""


@dataclass(frozen=True, slots=True)
class Visit:
    """Where an image is to be requested: its URL at first, and then where redirects lead."""

    target: Target
    redirects: int = 0
    cookies: tuple[SetCookie, ...] = ()
    """Cookies that the redirects set."""

    def follow(self, location: str, cookies: Iterable[SetCookie] = ()) -> Visit:
        """Return the visit that a redirect leads to, which may set cookies.

        Raises TooManyRedirects, InvalidUrl or UnsupportedSource.
        """
        if self.redirects == MAX_REDIRECTS:
            raise TooManyRedirects(f"more than {MAX_REDIRECTS} redirects")
        return Visit(resolve_redirect(self.target, location), self.redirects + 1, (*self.cookies, *cookies))

    def explain(self, error: RowError) -> RowError:
        """Return an error that says where redirects led, if there were any."""
        if not self.redirects:
            return error
        return type(error)(f"redirects to {url_label(self.target.key)[:80]}: {error}")


class HttpClient:
    """Sends requests. An async context manager for one event loop.

    Any number of requests may be in progress: how many, and to which hosts, is for the caller to limit.

    Args:
        options: Limits.
        host_headers: Headers for certain hosts.
    """

    def __init__(self, options: FetchOptions, host_headers: HostHeaders) -> None:
        self._max_bytes, self._seconds = options.max_image_bytes, float(options.fetch_timeout)
        self._stall_seconds = min(STALL_SECONDS, self._seconds / 2)
        most_idle = _MAX_IDLE // (options.fetch_processes or 1)
        self._max_idle = min(max(_MIN_IDLE, max_connections() - options.fetch_concurrency), most_idle)
        self._ignores_opt_out, self._keeps = options.ignore_opt_out, options.cache is not None
        self._headers = {
            "User-Agent": user_agent(options.user_agent, options.contact),
            "Accept": "image/*,*/*;q=0.5",
            "Accept-Encoding": ACCEPT_ENCODING,
        }
        self._host_headers = host_headers
        self._proxy = options.proxy
        self._proxy_check: asyncio.Task[None] | None = None
        self._guard = NetworkGuard(options.allow_private, options.allow_host)

    async def __aenter__(self) -> HttpClient:
        self._connections = Connections(
            self._guard,
            Resolver(),
            connect_timeout=min(MAX_CONNECT_SECONDS, self._seconds / 3),  # leaves time for an answer
            keep_alive=_KEEP_ALIVE_SECONDS,
            max_idle=self._max_idle,
            proxy=self._proxy,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._proxy_check is not None:
            self._proxy_check.cancel()
            await asyncio.gather(self._proxy_check, return_exceptions=True)
        await self._connections.close()

    async def check_proxy(self) -> None:
        """Check the proxy, if there is one. Raises ProxyError if it cannot be used."""
        await self._connections.check_proxy()

    async def get(self, visit: Visit, buffer: Receiver, seconds: float, *, close: bool = False) -> Visit | None:
        """Request an image once, within --fetch-timeout.

        Args:
            visit: Where.
            buffer: Where its bytes go.
            seconds: Time limit, besides --fetch-timeout.
            close: Close the connection afterwards.

        Returns:
            None if the image has arrived, or where the request is redirected to.

        Raises:
            FetchError: The image cannot be fetched.
            TransientError: Another attempt may help.
            NoRoom: There is no room for the image.
            ProxyError: The proxy cannot be used any more.
            OptionError: The proxy cannot be used at the first request.
        """
        await self._check_proxy_once()
        seconds = min(seconds, self._seconds)
        deadline = asyncio.get_running_loop().time() + seconds
        body_started = False
        try:
            async with asyncio.timeout_at(deadline) as timeout:
                request = self._connections.request(visit.target, self._headers_for(visit), close=close)
                with await request as response:
                    if response.status in REDIRECTS:
                        return _follow(visit, response)
                    if response.status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
                        await self.check_proxy()  # the answer may be the host's, and that is no reason to stop
                    check_status(response.status, response.headers)
                    if not self._ignores_opt_out and (directive := opt_out_of(response.headers.items())):
                        raise OptedOut(f"opted out by its server (X-Robots-Tag: {directive}); see --ignore-opt-out")
                    buffer.may_be_kept = self._keeps and may_be_kept(response.headers)
                    body_started = True
                    await self._receive(response, buffer, timeout, deadline)
        except TimeoutError as error:
            raise timed_out(seconds, body_started=body_started) from error
        except ProxyError:
            raise
        except (HttpError, AddressRefused, ValueError) as error:
            raise classify(error) from error
        return None

    async def _check_proxy_once(self) -> None:
        """Let the first request find out whether the proxy can be used: a wrong one would fail every row."""
        if self._proxy is None:
            return
        if self._proxy_check is None:
            self._proxy_check = asyncio.create_task(self.check_proxy())
        try:
            await asyncio.shield(self._proxy_check)
        except ProxyError as error:
            raise OptionError(f"--proxy: {error}") from None

    def _headers_for(self, visit: Visit) -> list[tuple[str, str]]:
        target = visit.target
        headers = {**self._headers, **self._host_headers.headers_for(target)}
        if target.authorization is not None:
            headers["Authorization"] = target.authorization
        if visit.cookies and (pairs := _cookies_for(visit)):
            headers["Cookie"] = "; ".join([*filter(None, [headers.get("Cookie")]), *pairs])
        return list(headers.items())

    async def _receive(self, response: Response, buffer: Receiver, timeout: asyncio.Timeout, deadline: float) -> None:
        """Receive a body. `timeout` expires early if the body is too slow."""
        limit, loop = self._max_bytes, asyncio.get_running_loop()
        decoder = BodyDecoder(response.codings, limit)
        length = None if decoder.codings else response.content_length
        check_length(length or 0, limit)
        await buffer.open(length)
        received = 0
        timeout.reschedule(min(deadline, loop.time() + self._stall_seconds))
        async for chunk in response:
            for piece in decoder.feed(chunk):
                buffer.write(piece)
            received += len(chunk)
            if received >= self._stall_seconds * MIN_BYTES_PER_SECOND:
                received = 0
                timeout.reschedule(min(deadline, loop.time() + self._stall_seconds))
        decoder.finish()
        if not buffer.length:
            raise EmptyImage("has no bytes")


def timed_out(seconds: float, *, body_started: bool) -> TransientError:
    """Return the error of a request that did not end in time."""
    if not body_started:
        return TransientError(FetchTimeout(f"no response within {seconds:g} s"), blames_host=True)
    late = f"not complete within {seconds:g} s, or slower than {MIN_BYTES_PER_SECOND} bytes/s"
    return TransientError(FetchTimeout(late))


def check_length(length: int, limit: int) -> None:
    """Raise TooManyBytes if an image has more bytes than the limit."""
    if length > limit:
        raise TooManyBytes(f"has {length:,} bytes, more than --max-image-bytes {limit:,}")


def max_connections() -> int:
    """Return how many connections this process may have, after raising its soft limit of open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(2 * _MIN_IDLE, hard - _RESERVED_FILES)


def user_agent(text: str | None = None, contact: str | None = None) -> str:
    """Return the User-Agent header.

    Args:
        text: The header, if it is not to be batchvl's own.
        contact: Email address or URL of the operator, to be added.

    >>> user_agent("curator/1.0", "me@example.org")
    'curator/1.0 (+me@example.org)'
    """
    name = f"batchvl/{__version__}" if text is None else text
    note = contact or ("offline batch inference of vision-language models" if text is None else "")
    return f"{name} (+{note})" if note else name


def _follow(visit: Visit, response: Response) -> Visit:
    """Return the visit that a redirect leads to, with the cookies that it sets."""
    location = response.headers.get("Location", "")
    if not location.strip():
        raise HttpStatus(f"HTTP status {response.status} without a location")
    fields = response.headers.getall("Set-Cookie", ())
    url = str(visit.target.url) if fields else ""
    return visit.follow(location, [SetCookie(url, field.encode("utf-8", "surrogateescape")) for field in fields])


def _cookies_for(visit: Visit) -> list[str]:
    """Return the cookies for a visit, as the Cookie header has them."""
    jar = CookieJar(unsafe=True)  # of addresses too
    for cookie in visit.cookies:
        with suppress(CookieError):
            field = cookie.field.decode("utf-8", "surrogateescape")
            jar.update_cookies(SimpleCookie(field), URL(cookie.url, encoded=True))
    return [f"{name}={cookie.coded_value}" for name, cookie in jar.filter_cookies(visit.target.url).items()]
