"""Faults in how a response is delimited: status lines, lengths, chunks, interim responses (RFC 9112)."""

from __future__ import annotations

from .messages import CHUNKED, DECOY, IMAGE, LAST_CHUNK, answer, chunk, head, length
from .registry import conversation, response
from .server import Exchange

_HALF = len(IMAGE) // 2
_TYPE = "Content-Type: image/jpeg"

# Versions and status lines
response("http_0_9", IMAGE, "connection_failed", close=True)
response("http_1_0", head(_TYPE, version="HTTP/1.0") + IMAGE, close=True)
response("http_1_0_keep_alive", answer("Connection: keep-alive", version="HTTP/1.0"))
response("http_2_in_the_status_line", answer(version="HTTP/2", status="200"))
response("http_2_frames", b"\0\0\6\4\0\0\0\0\0\0\3\0\0\0\x64" * 3, "connection_failed", close=True)
response("http_7_7", answer(version="HTTP/7.7"), "connection_failed")
response("icy", answer(version="ICY"), "connection_failed", close=True)
response("ssh", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "connection_failed", close=True)
response("status_without_reason", answer(status="200"))
response("status_without_reason_and_space", answer(status="200 "))
response("status_reason_in_latin_1", answer().replace(b"200 OK", b"200 D\xe9j\xe0 vu", 1))
# curl reads the first of these, and refuses the second.
response("status_after_two_spaces", answer(status=" 200 OK"), "connection_failed", curl=False)
response("blank_line_before_the_status", b"\r\n" + answer(), curl=False)
response("status_after_a_tab", answer().replace(b" 200 OK", b"\t200 OK", 1), "connection_failed")
response("status_in_lower_case", answer(version="http/1.1", status="200 ok"))
response("status_of_two_digits", answer(status="20 OK"), "connection_failed")
response("status_of_four_digits", answer(status="2000 OK"), "connection_failed")
response("status_of_letters", answer(status="abc OK"), "connection_failed")
response("reason_of_10_000_characters", answer(status="200 " + "OK" * 5000))

# Content-Length
response("length_twice", answer(length(IMAGE)))
response("length_three_times", answer(length(IMAGE), length(IMAGE)))
response("length_in_a_list", head(f"{length(IMAGE)}, {len(IMAGE)}") + IMAGE)
response("length_twice_different", answer("Content-Length: 10"), "connection_failed")
# curl reads it, but parsers differ on where such a body ends.
response("length_with_plus", head(f"Content-Length: +{len(IMAGE)}") + IMAGE, "connection_failed", curl=False)
response("length_with_zeros", head(f"Content-Length: 000000{len(IMAGE)}") + IMAGE)
response("length_with_spaces", head(f"Content-Length:    {len(IMAGE)}   ") + IMAGE)
response("length_negative", head("Content-Length: -5") + IMAGE, "connection_failed", close=True)
response("length_of_letters", head("Content-Length: abc") + IMAGE, "connection_failed", close=True)
response("length_hexadecimal", head(f"Content-Length: 0x{len(IMAGE):x}") + IMAGE, "connection_failed", close=True)
response("length_missing_value", head("Content-Length:") + IMAGE, "connection_failed", close=True)
response("length_over_64_bits", head("Content-Length: 99999999999999999999999") + IMAGE, "too_many_bytes", close=True)
response("length_and_chunked", answer(CHUNKED, body=chunk(IMAGE) + LAST_CHUNK))
response("length_beyond_the_body", head(f"Content-Length: {len(IMAGE) + 500}") + IMAGE, "connection_failed", close=True)
response("length_within_the_body", head(f"Content-Length: {_HALF}") + IMAGE, "truncated_image", body=IMAGE[:_HALF])
response("length_within_the_response", answer() + b"\r\n<!-- cached by a plugin -->")
response("no_length", head(_TYPE) + IMAGE, close=True)

# Chunks
_START = head(CHUNKED, _TYPE)
_WHOLE = chunk(IMAGE) + LAST_CHUNK
response("chunks", _START + chunk(IMAGE[:_HALF]) + chunk(IMAGE[_HALF:]) + LAST_CHUNK)
response("chunks_of_one_byte", _START + b"".join(chunk(bytes([byte])) for byte in IMAGE) + LAST_CHUNK)
response("chunk_size_in_upper_case", _START + b"%X\r\n%s\r\n" % (len(IMAGE), IMAGE) + LAST_CHUNK)
response("chunk_size_with_zeros", _START + b"0000%x\r\n%s\r\n" % (len(IMAGE), IMAGE) + LAST_CHUNK)
response("chunk_size_and_spaces", _START + chunk(IMAGE, b"   ") + LAST_CHUNK)
response("chunk_size_negative", _START + b"-5\r\n" + IMAGE, "connection_failed", close=True)
response("chunk_size_over_64_bits", _START + b"f" * 17 + b"\r\n" + IMAGE, "connection_failed", close=True)
response("chunk_size_of_letters", _START + b"zzz\r\n" + IMAGE, "connection_failed", close=True)
response("chunk_extension", _START + chunk(IMAGE, b";name=value") + LAST_CHUNK)
response("chunk_extension_of_10_000_bytes", _START + chunk(IMAGE, b";name=" + b"x" * 10_000) + LAST_CHUNK)
# curl reads them, but parsers differ on where such chunks end.
_BARE = b"%x\n%s\n0\n\n" % (len(IMAGE), IMAGE)
response("chunk_line_ends_bare", _START + _BARE, "connection_failed", curl=False)
response("chunk_without_end", _START + chunk(IMAGE)[:-2] + LAST_CHUNK, "connection_failed", close=True)
response("chunk_cut", _START + chunk(IMAGE)[:_HALF], "connection_failed", close=True)
response("chunks_without_the_last", _START + chunk(IMAGE), "connection_failed", close=True)
response("chunks_without_the_last_line", _START + chunk(IMAGE) + b"0\r\n", "connection_failed", close=True)
response("chunks_claimed", _START + IMAGE, "connection_failed", close=True)
response("chunks_in_http_1_0", head(CHUNKED, version="HTTP/1.0") + _WHOLE, close=True)
response("trailer", _START + chunk(IMAGE) + b"0\r\nX-Digest: abc\r\n\r\n")
response("trailer_with_another_length", _START + chunk(IMAGE) + b"0\r\nContent-Length: 5\r\n\r\n")
response("transfer_coding_in_capitals", head("TRANSFER-ENCODING: CHUNKED") + _WHOLE)
response("transfer_coding_identity", answer("Transfer-Encoding: identity"), close=True)
response("transfer_coding_unknown", answer("Transfer-Encoding: foo"), "connection_failed", close=True)
response("transfer_coding_chunked_twice", head(CHUNKED, CHUNKED) + _WHOLE)

# Interim responses
_HINTS = head("Link: </style.css>; rel=preload", status="103 Early Hints")
response("early_hints", _HINTS + answer())
response("continue", head(status="100 Continue") + answer())
response("continue_200_times", head(status="100 Continue") * 200 + answer())
response("upgrade_offered", answer("Upgrade: h2,h2c", "Connection: Upgrade, Keep-Alive"))
response("switching_protocols", head("Upgrade: websocket", "Connection: Upgrade", status="101 X"), "http_status")


@conversation("fetch_timeout")
async def early_hints_without_end(exchange: Exchange) -> None:
    while True:
        await exchange.send(_HINTS, pause=0.1)


@conversation("connection_failed")
async def status_without_end(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 ")
    while True:
        await exchange.send(b"OK" * 1000, pause=0.005)


@conversation("connection_failed")
async def trailer_without_end(exchange: Exchange) -> None:
    await exchange.send(_START + chunk(IMAGE) + b"0\r\n")
    while True:
        await exchange.send(b"X-Note: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\r\n" * 50, pause=0.005)


@conversation("fetch_timeout")
async def chunk_extension_without_end(exchange: Exchange) -> None:
    await exchange.send(_START + b"5;name=")
    while True:
        await exchange.send(b"value" * 100, pause=0.1)


# More bytes than the response has: they must not answer the next row that uses the connection.
@conversation(rows=3)
async def response_splitting(exchange: Exchange) -> None:
    await exchange.send(answer() + answer(body=DECOY))


@conversation(rows=3)
async def response_splitting_after_chunks(exchange: Exchange) -> None:
    await exchange.send(_START + _WHOLE + answer(body=DECOY))


@conversation(rows=3)
async def a_blank_line_after_the_body(exchange: Exchange) -> None:
    await exchange.send(answer() + b"\r\n")
