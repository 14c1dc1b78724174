"""The registry of faults: how each one answers, and what a fetch should make of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .messages import IMAGE

if TYPE_CHECKING:
    from .server import Exchange

Handler = Callable[["Exchange"], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """A server that misbehaves in one way, at an address of its own."""

    name: str
    expected: str
    """The verdict that is due: "ok", or the error code of the row."""
    handler: Handler | None
    """Answers a request; None if no request ever arrives."""
    url: str
    """Template of its URL: HOST is its address with the port, ADDRESS without, OTHER another address of this fault."""
    rows: int = 1
    """How many rows of the manifest have its URL, each with a query of its own."""
    body: bytes = IMAGE
    """What arrives, after all decoding, if the verdict is "ok"."""
    tls: str = ""
    """How it is certified, a key of `certificates.KINDS`. Without, https URLs lead to a server that has no TLS."""
    at_connect: bool = False
    """Whether the handler is called for a connection, before a request has arrived on it."""
    curl: bool = True
    """Whether curl's verdict is the same. If not, a comment next to the fault says why ours is."""


FAULTS: dict[str, Fault] = {}
"""All faults by name, in the order of their addresses."""


def add(
    name: str,
    expected: str,
    handler: Handler | None,
    *,
    url: str = "",
    rows: int = 1,
    body: bytes = IMAGE,
    tls: str = "",
    at_connect: bool = False,
    curl: bool = True,
) -> None:
    """Register a fault. The arguments are the fields of `Fault`."""
    if name in FAULTS:
        raise ValueError(f"two faults have the name {name}")
    url = url or f"{'https' if tls else 'http'}://HOST/{name}"
    FAULTS[name] = Fault(name, expected, handler, url, rows, body, tls, at_connect, curl)


def conversation(
    expected: str = "ok", *, url: str = "", rows: int = 1, tls: str = "", at_connect: bool = False, curl: bool = True
) -> Callable[[Handler], Handler]:
    """Register a function as a fault with its name. It is called for each request."""

    def register(handler: Handler) -> Handler:
        add(handler.__name__, expected, handler, url=url, rows=rows, tls=tls, at_connect=at_connect, curl=curl)
        return handler

    return register


def response(
    name: str, data: bytes, expected: str = "ok", *, close: bool = False, body: bytes = IMAGE, curl: bool = True
) -> None:
    """Register a fault that answers every request with the same bytes, and then closes the connection if `close`."""

    async def send(exchange: Exchange) -> None:
        await exchange.send(data)
        if close:
            exchange.close()

    add(name, expected, send, body=body, curl=curl)
