"""Faults in connections: refused, silent, slow, lost, or in use when they should not be."""

from __future__ import annotations

from .messages import CHUNKED, DECOY, IMAGE, answer, chunk, head, length, redirect
from .registry import add, conversation
from .server import Exchange

_HEAD = head(length(IMAGE), "Content-Type: image/jpeg")
_HALF = len(IMAGE) // 2

add("connection_refused", "connection_failed", None, url="http://REFUSED/x.jpg")
add("connection_never_accepted", "fetch_timeout", None, url="http://STALLED/x.jpg")


# Silent
@conversation("fetch_timeout")
async def silent(exchange: Exchange) -> None:
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_in_the_header(exchange: Exchange) -> None:
    await exchange.send(_HEAD[:30])
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_after_the_header(exchange: Exchange) -> None:
    await exchange.send(_HEAD)
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_in_the_body(exchange: Exchange) -> None:
    await exchange.send(_HEAD + IMAGE[:_HALF])
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_before_the_last_chunk(exchange: Exchange) -> None:
    await exchange.send(head(CHUNKED) + chunk(IMAGE))
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_where_the_body_should_end(exchange: Exchange) -> None:
    """Neither a length, nor chunks, nor the end of the connection."""
    await exchange.send(head("Content-Type: image/jpeg") + IMAGE)
    await exchange.hang()


@conversation("fetch_timeout")
async def silent_with_a_length_too_large(exchange: Exchange) -> None:
    await exchange.send(head(f"Content-Length: {len(IMAGE) + 500}") + IMAGE)
    await exchange.hang()


@conversation()
async def silent_once(exchange: Exchange) -> None:
    if exchange.number == 1:
        await exchange.hang()
    else:
        await exchange.send(answer())


# Slow
@conversation()
async def slow_start(exchange: Exchange) -> None:
    await exchange.send(b"", pause=0.5)
    await exchange.send(answer())


@conversation()
async def slow_pieces(exchange: Exchange) -> None:
    data = answer()
    await exchange.send(*(data[start : start + 500] for start in range(0, len(data), 500)), pause=0.02)


@conversation()
async def slow_header(exchange: Exchange) -> None:
    await exchange.send(*(bytes([byte]) for byte in _HEAD), pause=0.005)
    await exchange.send(IMAGE)


@conversation("fetch_timeout")
async def drip_of_a_header(exchange: Exchange) -> None:
    await exchange.send(*(bytes([byte]) for byte in answer()), pause=0.25)


@conversation("fetch_timeout")
async def drip_of_a_body(exchange: Exchange) -> None:
    await exchange.send(_HEAD)
    await exchange.send(*(bytes([byte]) for byte in IMAGE), pause=0.25)


# Lost
@conversation("connection_failed", at_connect=True)
async def closed_before_the_request(exchange: Exchange) -> None:
    exchange.close()


@conversation("connection_failed", at_connect=True)
async def reset_before_the_request(exchange: Exchange) -> None:
    await exchange.reset()


@conversation("connection_failed")
async def closed_before_the_response(exchange: Exchange) -> None:
    exchange.close()


@conversation("connection_failed")
async def reset_before_the_response(exchange: Exchange) -> None:
    await exchange.reset()


@conversation("connection_failed")
async def closed_in_the_header(exchange: Exchange) -> None:
    await exchange.send(_HEAD[:30])
    exchange.close()


@conversation("connection_failed")
async def closed_after_the_header(exchange: Exchange) -> None:
    await exchange.send(_HEAD)
    exchange.close()


@conversation("connection_failed")
async def closed_in_the_body(exchange: Exchange) -> None:
    await exchange.send(_HEAD + IMAGE[:_HALF])
    exchange.close()


@conversation("connection_failed")
async def reset_in_the_body(exchange: Exchange) -> None:
    await exchange.send(_HEAD + IMAGE[:_HALF])
    await exchange.reset()


@conversation()
async def reset_after_the_response(exchange: Exchange) -> None:
    await exchange.send(answer("Connection: close"))
    await exchange.reset()


@conversation()
async def half_closed_after_the_response(exchange: Exchange) -> None:
    await exchange.send(head("Content-Type: image/jpeg") + IMAGE)
    await exchange.shut()


@conversation()
async def closed_twice(exchange: Exchange) -> None:
    if exchange.number < 3:
        exchange.close()
    else:
        await exchange.send(answer())


@conversation()
async def closed_in_the_body_once(exchange: Exchange) -> None:
    if exchange.number == 1:
        await exchange.send(_HEAD + IMAGE[:_HALF])
        exchange.close()
    else:
        await exchange.send(answer())


@conversation()
async def reset_in_the_body_once(exchange: Exchange) -> None:
    if exchange.number == 1:
        await exchange.send(_HEAD + IMAGE[:_HALF])
        await exchange.reset()
    else:
        await exchange.send(answer())


# In use when they should not be
@conversation()
async def left_open_in_spite_of_close(exchange: Exchange) -> None:
    await exchange.send(answer("Connection: close"))
    await exchange.hang()


@conversation(rows=4)
async def closed_in_spite_of_keep_alive(exchange: Exchange) -> None:
    await exchange.send(answer("Connection: keep-alive", "Keep-Alive: timeout=60, max=100"))
    exchange.close()


@conversation(rows=4)
async def closed_at_the_second_request(exchange: Exchange) -> None:
    if exchange.on_connection == 1:
        await exchange.send(answer())
    else:
        exchange.close()


@conversation(rows=4)
async def reset_at_the_second_request(exchange: Exchange) -> None:
    if exchange.on_connection == 1:
        await exchange.send(answer())
    else:
        await exchange.reset()


@conversation(rows=4)
async def reset_after_each_response(exchange: Exchange) -> None:
    await exchange.send(answer())
    await exchange.reset()


@conversation(rows=3)
async def a_timeout_while_idle(exchange: Exchange) -> None:
    """As Apache and load balancers do: a status 408 that answers no request, and the end of the connection."""
    await exchange.send(answer(), pause=0.05)
    await exchange.send(answer("Connection: close", status="408 Request Timeout", body=b""))
    exchange.close()


@conversation(at_connect=True)
async def response_whatever_the_request(exchange: Exchange) -> None:
    """The server never reads the request. A response that comes before it is sent is one that nobody asked for."""
    await exchange.send(b"", pause=0.2)
    await exchange.send(answer("Connection: close"))
    await exchange.hang()


# curl takes it, as do others. What arrives on an idle connection makes it unfit for another request.
@conversation(curl=False)
async def another_image_while_idle(exchange: Exchange) -> None:
    """While another host answers, an image arrives that nobody has asked for: it must not answer the next request."""
    if exchange.target == "/away":
        await exchange.send(b"", pause=0.3)
        await exchange.send(redirect(f"Location: {exchange.expand('http://HOST/back.jpg')}"))
    elif exchange.target == "/back.jpg":
        await exchange.send(answer())
    else:
        away = redirect(f"Location: {exchange.expand('http://OTHER/away')}")
        await exchange.send(away, answer(body=DECOY), pause=0.1)
