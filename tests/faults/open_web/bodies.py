"""Faults in bodies: no image, nothing, too much, or without end."""

from __future__ import annotations

from .messages import CHUNKED, IMAGE, MAX_IMAGE_BYTES, PAGE, SECRET, answer, chunk, head
from .registry import conversation, response
from .server import Exchange

# No image
response("body_html", answer(body=PAGE), "not_an_image", body=PAGE)
_JSON = b'{"error": "' + SECRET + b'"}'
response("body_json", answer(body=_JSON), "not_an_image", body=_JSON)
_JUNK = SECRET * 1000
response("body_junk", answer(body=_JUNK), "not_an_image", body=_JUNK)
_LED = b"\r\n\r\n" + IMAGE
response("body_after_blank_lines", answer(body=_LED), "not_an_image", body=_LED)
_MARKED = b"\xef\xbb\xbf" + IMAGE
response("body_after_a_byte_order_mark", answer(body=_MARKED), "not_an_image", body=_MARKED)

# Nothing
response("body_empty", answer(body=b""), "empty_image", body=b"")
response("body_empty_in_chunks", head(CHUNKED) + b"0\r\n\r\n", "empty_image", body=b"")
response("body_empty_without_length", head("Content-Type: image/jpeg"), "empty_image", close=True, body=b"")

# Too much, and not quite
_TRAILED = IMAGE + b"\r\n<!-- cached by a plugin -->"
response("body_before_junk", answer(body=_TRAILED), body=_TRAILED)
_LARGEST = IMAGE + bytes(MAX_IMAGE_BYTES - len(IMAGE))
response("body_as_large_as_allowed", answer(body=_LARGEST), body=_LARGEST)
response("body_as_large_as_allowed_in_chunks", head(CHUNKED) + chunk(_LARGEST) + b"0\r\n\r\n", body=_LARGEST)

# curl has no limit on bytes, unless it is given one; ours is --max-image-bytes.
_LARGE = _LARGEST + b"\0"
response("body_too_large", answer(body=_LARGE), "too_many_bytes", curl=False)
response("body_too_large_in_chunks", head(CHUNKED) + chunk(_LARGE) + b"0\r\n\r\n", "too_many_bytes", curl=False)
response("body_too_large_without_length", head() + _LARGE, "too_many_bytes", close=True, curl=False)
response("body_of_1_tb", head("Content-Length: 1000000000000") + IMAGE, "too_many_bytes")


@conversation("too_many_bytes")
async def body_without_end(exchange: Exchange) -> None:
    await exchange.send(head("Content-Type: image/jpeg"))
    while True:
        await exchange.send(_LARGEST[:65536], pause=0.001)


@conversation("too_many_bytes")
async def body_without_end_in_chunks(exchange: Exchange) -> None:
    await exchange.send(head(CHUNKED))
    while True:
        await exchange.send(chunk(_LARGEST[:65536]), pause=0.001)


@conversation("fetch_timeout")
async def body_of_a_camera(exchange: Exchange) -> None:
    """A film in Motion JPEG: images without end, each a part of one body."""
    await exchange.send(head("Content-Type: multipart/x-mixed-replace; boundary=part"))
    while True:
        await exchange.send(b"--part\r\nContent-Type: image/jpeg\r\n\r\n" + IMAGE + b"\r\n", pause=0.4)
