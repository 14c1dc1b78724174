"""Faults in header fields, and what fields say about the use of an image."""

from __future__ import annotations

from .messages import IMAGE, answer, head, length
from .registry import conversation, response
from .server import Exchange

# Syntax
response("line_ends_bare", head(length(IMAGE), "Content-Type: image/jpeg", end=b"\n") + IMAGE)
response("line_ends_mixed", head(length(IMAGE)).replace(b"OK\r\n", b"OK\n") + IMAGE)
# curl reads it, but parsers differ on whether a field begins here.
response("line_ends_with_a_lone_return", answer("X-Note: a\rb"), "connection_failed", curl=False)
response("field_without_colon", answer("this is no field"), "connection_failed")
response("field_without_name", answer(": value"))
response("field_with_space_before_colon", head(f"Content-Length : {len(IMAGE)}") + IMAGE, close=True)
response("field_with_space_in_its_name", answer("X Note: value"))
response("field_name_with_at", answer("X@Note: value"))
response("field_name_in_latin_1", answer("X-Größe: 1".encode("latin-1")))
response("field_without_value", answer("X-Note:"))
response("field_in_latin_1", answer('Content-Disposition: inline; filename="käse.jpg"'.encode("latin-1")))
response("field_in_utf_8", answer('Content-Disposition: inline; filename="käse.jpg"'.encode()))
response("field_with_nul", answer(b"X-Note: a\0b"), "connection_failed")
response("field_with_control_characters", answer(b"X-Note: a\1\2\x7fb"))
response("field_folded", answer("X-Note: a\r\n  b"))
# curl refuses these two. The first is folded as any field may be (RFC 9112, section 5.2), the second says nothing.
response("field_folded_length", head(f"Content-Length:\r\n {len(IMAGE)}") + IMAGE, curl=False)
response("first_field_folded", head(" X-Note: a", length(IMAGE)) + IMAGE, curl=False)
response("type_missing", head(length(IMAGE)) + IMAGE)
response("type_wrong", head(length(IMAGE), "Content-Type: text/html; charset=utf-8") + IMAGE)
response("type_garbled", head(length(IMAGE), "Content-Type: image/jpeg; charset=binary; x;;=") + IMAGE)
response("type_twice", answer("Content-Type: text/plain"))

# Sizes
response("field_of_12_kb", answer("Content-Security-Policy: " + "a" * 12_000))
response("field_of_30_kb", answer("Content-Security-Policy: " + "a" * 30_000))
response("field_of_60_kb", answer("Content-Security-Policy: " + "a" * 60_000))
response("fields_of_60_kb", answer(*(f"Set-Cookie: c{number}={'a' * 2980}" for number in range(20))))
response("fields_500", answer(*(f"X-Note-{number}: a" for number in range(500))))
response("field_of_1_mb", answer("X-Note: " + "a" * 1_000_000), "connection_failed", close=True)
# curl allows 300 KB; we promise 64 KB, which are twice what common servers and proxies can send.
response("fields_of_200_kb", answer(*(f"X-{n}: {'a' * 2000}" for n in range(100))), "connection_failed", curl=False)


@conversation("connection_failed")
async def fields_without_end(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await exchange.send(b"X-Note: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 50, pause=0.005)


# Opt-outs: curl knows nothing of them; we respect them by default.
def _robots(name: str, *values: str, opted_out: bool) -> None:
    fields = [f"X-Robots-Tag: {value}" for value in values]
    response(f"robots_{name}", answer(*fields), "opted_out" if opted_out else "ok", curl=not opted_out)


_robots("noai", "noai", opted_out=True)
_robots("noimageai", "noimageai", opted_out=True)
_robots("in_capitals", "NoAI", opted_out=True)
_robots("in_a_list", "noindex, nofollow , noai", opted_out=True)
_robots("in_the_second_field", "noindex", "noimageai", opted_out=True)
_robots("for_us", "batchvl: noai", opted_out=True)
_robots("for_us_after_another", "otherbot: noindex, batchvl: noai", opted_out=True)
_robots("for_another", "otherbot: noai", opted_out=False)
_robots("list_for_another", "otherbot: noindex, noai", opted_out=False)
_robots("for_all_after_another", "otherbot: noindex", "noai", opted_out=True)
_robots("noindex", "noindex, noimageindex", opted_out=False)
_robots("with_a_date", "unavailable_after: 25 Jun 2040 15:00:00 PST", opted_out=False)
_robots("with_a_date_and_noai", "unavailable_after: 25 Jun 2040 15:00:00 PST, noai", opted_out=True)
_robots("alike", "noairplanes, nonoai", opted_out=False)
_robots("empty", "", opted_out=False)
