"""Faults in TLS: certificates, handshakes, and endings."""

from __future__ import annotations

from .messages import IMAGE, PAGE, answer, head
from .registry import add, conversation
from .server import Exchange


async def _answer(exchange: Exchange) -> None:
    await exchange.send(answer())


add("tls_valid", "ok", _answer, tls="valid")
for _kind in ("wrong_name", "expired", "not_yet_valid", "self_signed", "unknown_authority", "no_cipher", "mutual"):
    add(f"tls_{_kind}", "connection_failed", _answer, tls=_kind)

# Each where the other is expected
add("tls_where_plain_is_expected", "connection_failed", _answer, url="http://TLS/x.jpg")


@conversation("connection_failed", url="https://PLAIN/x.jpg", at_connect=True)
async def plain_where_tls_is_expected(exchange: Exchange) -> None:
    await exchange.send(answer(status="400 Bad Request", body=PAGE))
    await exchange.hang()


@conversation("connection_failed", url="https://PLAIN/x.jpg", at_connect=True)
async def tls_garbage(exchange: Exchange) -> None:
    await exchange.send(bytes(range(256)))
    exchange.close()


@conversation("connection_failed", url="https://PLAIN/x.jpg", at_connect=True)
async def tls_closed(exchange: Exchange) -> None:
    exchange.close()


@conversation("connection_failed", url="https://PLAIN/x.jpg", at_connect=True)
async def tls_reset(exchange: Exchange) -> None:
    await exchange.reset()


@conversation("fetch_timeout", url="https://PLAIN/x.jpg", at_connect=True)
async def tls_silent(exchange: Exchange) -> None:
    await exchange.hang()


@conversation(tls="valid")
async def tls_without_goodbye(exchange: Exchange) -> None:
    """An ending without an alert, as if somebody had cut it, but the length says that nothing is missing."""
    await exchange.send(answer("Connection: close"))
    await exchange.close_without_goodbye()


@conversation(tls="valid")
async def tls_without_goodbye_and_length(exchange: Exchange) -> None:
    await exchange.send(head("Content-Type: image/jpeg") + IMAGE)
    await exchange.close_without_goodbye()


@conversation("connection_failed", tls="valid")
async def tls_cut(exchange: Exchange) -> None:
    await exchange.send(answer()[:-500])
    await exchange.close_without_goodbye()
