"""Responses out of bytes: what is forgiven, what is an error, and that pieces of any size make no difference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchvl.fetching.http1.errors import Disconnected, IncompleteBody, ProtocolError
from batchvl.fetching.http1.head import MAX_LENGTH, encode_request, parse_head
from batchvl.fetching.http1.parser import MAX_HEAD_BYTES, ResponseParser
from batchvl.fetching.urls import parse_url

OK = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: 3\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"3\r\nabc\r\n0\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

REUSABLE = {
    "a length": OK + LENGTH + b"\r\nabc",
    "a version in lower case": b"http/1.1 200 ok\r\n" + LENGTH + b"\r\nabc",
    "no reason": b"HTTP/1.1 200\r\n" + LENGTH + b"\r\nabc",
    "a reason in Latin-1": b"HTTP/1.1 200 D\xe9j\xe0 vu\r\n" + LENGTH + b"\r\nabc",
    "HTTP/1.0 with keep-alive": b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n" + LENGTH + b"\r\nabc",
    "a blank line first": b"\r\n\n" + OK + LENGTH + b"\r\nabc",
    "bare line ends": b"HTTP/1.1 200 OK\nContent-Length: 3\n\nabc",
    "mixed line ends": OK + b"Content-Length: 3\n\r\nabc",
    "the length three times": OK + LENGTH * 3 + b"\r\nabc",
    "the length in a list": OK + b"Content-Length: 3, 3\r\n\r\nabc",
    "the length with zeros": OK + b"Content-Length: 0003\r\n\r\nabc",
    "the length in spaces": OK + b"Content-Length: \t 3 \t\r\n\r\nabc",
    "the length folded": OK + b"Content-Length:\r\n 3\r\n\r\nabc",
    "a folded field": OK + b"X-Note: a\r\n\tb\r\n" + LENGTH + b"\r\nabc",
    "a folded first field": OK + b" X-Note: a\r\n" + LENGTH + b"\r\nabc",
    "a fold of white space": OK + b"X-Note: a\r\n \r\n" + LENGTH + b"\r\nabc",
    "control characters": OK + b"X-Note: \1\2\x7f\r\n" + LENGTH + b"\r\nabc",
    "chunks": OK + CHUNKED + b"\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n",
    "a size in upper case": OK + CHUNKED + b"\r\n" + b"0003  \r\nabc\r\n00\r\n\r\n",
    "an extension": OK + CHUNKED + b'\r\n3 ;name="value"\r\nabc\r\n0;last\r\n\r\n',
    "a trailer": OK + CHUNKED + b"\r\n3\r\nabc\r\n0\r\nContent-Length: 9\r\nno colon\r\n\r\n",
    "capitals": OK + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n" + CHUNKS,
    "interim responses": CONTINUE * 3 + b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK + LENGTH + b"\r\nabc",
}
"""Responses with the body "abc", after which another may follow."""

NOT_REUSABLE = {
    "close": OK + b"Connection: close\r\n" + LENGTH + b"\r\nabc",
    "close among others": OK + b"Connection: Upgrade\r\nConnection: x, Close\r\n" + LENGTH + b"\r\nabc",
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + LENGTH + b"\r\nabc",
    "HTTP/2": b"HTTP/2 200\r\n" + LENGTH + b"\r\nabc",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\n" + LENGTH + b"\r\nabc",
    "a length beside chunks": OK + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks twice": OK + CHUNKED * 2 + b"\r\n" + CHUNKS,
    "chunks in HTTP/1.0": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    "identity": OK + LENGTH + b"Transfer-Encoding: identity\r\n\r\nabc",
    "a space before the colon": OK + b"Transfer-Encoding : chunked\r\n" + LENGTH + b"\r\nabc",
    "no name": OK + b": value\r\n" + LENGTH + b"\r\nabc",
    "a name in Latin-1": OK + b"X-Gr\xf6\xdfe: 1\r\n" + LENGTH + b"\r\nabc",
    "more than the length": OK + LENGTH + b"\r\nabcd",
    "more than the chunks": OK + CHUNKED + b"\r\n" + CHUNKS + b"\n",
    "another response": OK + LENGTH + b"\r\nabc" + OK + LENGTH + b"\r\nxyz",
}
"""Responses with the body "abc", after which the connection is to be closed."""

INVALID = {
    "HTTP/0.9": b"<html>",
    "no version": b"ICY 200 OK\r\n" + LENGTH + b"\r\nabc",
    "another version": b"HTTP/1.2 200 OK\r\n" + LENGTH + b"\r\nabc",
    "two spaces": b"HTTP/1.1  200 OK\r\n" + LENGTH + b"\r\nabc",
    "a tab": b"HTTP/1.1\t200 OK\r\n" + LENGTH + b"\r\nabc",
    "a status of two digits": b"HTTP/1.1 20 OK\r\n" + LENGTH + b"\r\nabc",
    "a status of four digits": b"HTTP/1.1 2000 OK\r\n" + LENGTH + b"\r\nabc",
    "a status below 100": b"HTTP/1.1 099 OK\r\n" + LENGTH + b"\r\nabc",
    "other digits": "HTTP/1.1 ２００ OK\r\n\r\n".encode(),
    "no colon": OK + b"what\r\n" + LENGTH + b"\r\nabc",
    "a NUL": OK + b"X-Note: a\0b\r\n" + LENGTH + b"\r\nabc",
    "a lone CR": OK + b"X-Note: a\rContent-Length: 5\r\n" + LENGTH + b"\r\nabc",
    "two CRs": OK + b"X-Note: a\r\r\n" + LENGTH + b"\r\nabc",
    "an error after an interim response": CONTINUE + b"what",
    "different lengths": OK + LENGTH + b"Content-Length: 4\r\n\r\nabcd",
    "different lengths in a list": OK + b"Content-Length: 3, 4\r\n\r\nabcd",
    "a negative length": OK + b"Content-Length: -3\r\n\r\nabc",
    "a length with a plus": OK + b"Content-Length: +3\r\n\r\nabc",
    "a length with text": OK + b"Content-Length: 3 bytes\r\n\r\nabc",
    "an empty length": OK + b"Content-Length:\r\n\r\nabc",
    "half a list of lengths": OK + b"Content-Length: 3,\r\n\r\nabc",
    "a length of other digits": OK + "Content-Length: ３\r\n\r\nabc".encode(),
    "a transfer coding": OK + b"Transfer-Encoding: br, chunked\r\n\r\n" + CHUNKS,
    "a size with a sign": OK + CHUNKED + b"\r\n+3\r\nabc\r\n0\r\n\r\n",
    "a size with a prefix": OK + CHUNKED + b"\r\n0x3\r\nabc\r\n0\r\n\r\n",
    "a size with an underscore": OK + CHUNKED + b"\r\n0_3\r\nabc\r\n0\r\n\r\n",
    "a size after a space": OK + CHUNKED + b"\r\n 3\r\nabc\r\n0\r\n\r\n",
    "a size with text": OK + CHUNKED + b"\r\n3 x\r\nabc\r\n0\r\n\r\n",
    "a size of nothing": OK + CHUNKED + b"\r\n\r\nabc\r\n0\r\n\r\n",
    "a size beyond 62 bits": OK + CHUNKED + b"\r\n4000000000000001\r\nabc",
    "a bare line end after a size": OK + CHUNKED + b"\r\n3\nabc\r\n0\r\n\r\n",
    "a lone CR after a size": OK + CHUNKED + b"\r\n3;\rx\r\nabc\r\n0\r\n\r\n",
    "a chunk longer than its size": OK + CHUNKED + b"\r\n2\r\nabc\r\n0\r\n\r\n",
    "a bare line end after a chunk": OK + CHUNKED + b"\r\n3\r\nabc\n0\r\n\r\n",
    "a bare line end in a trailer": OK + CHUNKED + b"\r\n3\r\nabc\r\n0\r\nX: y\n\r\n",
}


def parse(pieces: Iterable[bytes]) -> ResponseParser:
    parser = ResponseParser()
    for piece in pieces:
        parser.feed(memoryview(piece))
    return parser


def splits(data: bytes) -> Iterator[list[bytes]]:
    """Yield the data in one piece, in pieces of a byte, and cut in two everywhere."""
    yield [data]
    yield [data[at : at + 1] for at in range(len(data))]
    yield from ([data[:at], data[at:]] for at in range(1, len(data)))


@pytest.mark.parametrize("name", REUSABLE | NOT_REUSABLE)
def test_a_response_in_pieces_of_any_size(name: str) -> None:
    for pieces in splits((REUSABLE | NOT_REUSABLE)[name]):
        parser = parse(pieces)
        assert parser.head is not None
        assert parser.head.status == 200
        assert bytes(parser.take_body()) == b"abc"
        assert parser.is_complete
        assert parser.is_reusable is (name in REUSABLE), pieces


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_response_in_pieces_of_any_size(name: str) -> None:
    for pieces in splits(INVALID[name]):
        with pytest.raises(ProtocolError):
            parse(pieces)


@pytest.mark.parametrize(
    ("start", "wrong"), [(b"", b"S"), (b"", b"\x15"), (b"HTT", b"X"), (b"HTTP", b" "), (b"\r\n", b"<")]
)
def test_what_is_no_status_line_is_an_error_at_its_first_byte(start: bytes, wrong: bytes) -> None:
    parser = parse([start])
    with pytest.raises(ProtocolError, match="does not begin"):
        parser.feed(memoryview(wrong))


@given(st.sampled_from([*(REUSABLE | NOT_REUSABLE | INVALID).values()]), st.data())
def test_pieces_make_no_difference_to_garbage(original: bytes, data: st.DataObject) -> None:
    """Bytes are replaced at random: the parser raises nothing but ProtocolError, wherever the data is cut."""
    garbled = bytearray(original)
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(garbled) - 1))
        garbled[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"\r\n", b"\n", b"\r", b"0", b": "])
        )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(garbled)), max_size=6)))
    pieces = [bytes(garbled[start:end]) for start, end in zip([0, *cuts], [*cuts, len(garbled)], strict=True)]
    assert outcome(pieces) == outcome([bytes(garbled)])


def outcome(pieces: Iterable[bytes]) -> tuple[object, ...]:
    try:
        parser = parse(pieces)
    except ProtocolError as error:
        return (str(error),)
    return parser.head, bytes(parser.body), parser.is_complete, parser.is_reusable


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
def test_a_body_in_chunks_is_what_was_sent(bodies: list[bytes], size: int) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies if body)
    data = OK + CHUNKED + b"\r\n" + chunks + b"0\r\n\r\n"
    parser = parse(data[at : at + size] for at in range(0, len(data), size))
    assert (bytes(parser.body), parser.is_complete, parser.is_reusable) == (b"".join(bodies), True, True)


def test_the_end_of_the_connection_ends_a_body_without_length() -> None:
    parser = parse([b"HTTP/1.1 200 OK\r\n\r\nab", b"c"])
    assert not parser.is_complete
    parser.feed_end(None)
    assert (bytes(parser.body), parser.is_complete, parser.is_reusable) == (b"abc", True, False)


@pytest.mark.parametrize("tail", [LENGTH + b"\r\nab", CHUNKED + b"\r\n3\r\nabc\r\n0\r\n", CHUNKED + b"\r\n3\r\nab"])
def test_the_end_of_the_connection_does_not_end_other_bodies(tail: bytes) -> None:
    with pytest.raises(IncompleteBody):
        parse([OK + tail]).feed_end(None)


def test_a_broken_connection_ends_no_body() -> None:
    with pytest.raises(IncompleteBody) as caught:
        parse([b"HTTP/1.1 200 OK\r\n\r\nabc"]).feed_end(ConnectionResetError("gone"))
    assert isinstance(caught.value.os_error, ConnectionResetError)


@pytest.mark.parametrize("data", [b"", b"HTT", OK + LENGTH, CONTINUE])
def test_the_end_of_the_connection_before_a_response(data: bytes) -> None:
    with pytest.raises(Disconnected) as caught:
        parse([data] if data else []).feed_end(None)
    assert caught.value.has_begun is bool(data)


@pytest.mark.parametrize("status", [101, 204, 304])
@pytest.mark.parametrize("fields", [LENGTH, CHUNKED, b""])
def test_statuses_without_a_body(status: int, fields: bytes) -> None:
    parser = parse([b"HTTP/1.1 %d X\r\n%b\r\n" % (status, fields)])
    assert parser.head is not None
    assert (parser.head.status, parser.head.content_length) == (status, 0)
    assert (parser.is_complete, parser.is_reusable) == (True, status != 101)


def test_fields() -> None:
    head = parse_head(OK + b"A: 1\r\na:2 \r\nB: k\xc3\xa4se\r\nC: k\xe4se\r\nD:\r\n\r\n")
    assert head.headers.getall("a") == ["1", "2"]
    assert head.headers.get("b") == "käse"
    assert head.headers["C"].encode("utf-8", "surrogateescape") == b"k\xe4se"
    assert head.headers["D"] == ""
    assert head.headers.get("E", "none") == "none"
    assert [name for name, _ in head.headers.items()] == ["A", "a", "B", "C", "D"]


def test_a_length_beyond_all_bounds() -> None:
    for text in (b"9" * 19, b"9" * 60_000):
        assert parse_head(OK + b"Content-Length: " + text + b"\r\n\r\n").content_length == MAX_LENGTH


def test_codings_of_content_and_of_transfer() -> None:
    fields = b"Content-Encoding: br\r\nTransfer-Encoding: gzip, chunked\r\n"
    head = parse_head(OK + fields + b"Content-Encoding: deflate\r\n\r\n")
    assert (head.codings, head.is_chunked, head.is_persistent) == ("br, deflate, gzip", True, False)


def padded(size: int, *, before: bytes = b"", end: bytes = b"\r\n\r\n") -> bytes:
    """Return a head of this size in all."""
    start = before + OK + b"Content-Length: 0\r\nX-Note: "
    return start + b" " * (size - len(start) - len(end)) + end


@pytest.mark.parametrize("before", [b"", CONTINUE * 200, b"\r\n" * 100])
@pytest.mark.parametrize("step", [1, 1000, 10**6])
def test_the_limit_of_the_header(before: bytes, step: int) -> None:
    allowed, too_large = (padded(size, before=before) for size in (MAX_HEAD_BYTES, MAX_HEAD_BYTES + 1))
    assert parse(allowed[at : at + step] for at in range(0, len(allowed), step)).is_complete
    with pytest.raises(ProtocolError, match="larger than 64 KB"):
        parse(too_large[at : at + step] for at in range(0, len(too_large), step))


@pytest.mark.parametrize(
    "endless",
    [
        b"\r\n" * MAX_HEAD_BYTES,
        CONTINUE * 5_000,
        OK + b"X: y\r\n" * 20_000,
        OK + CHUNKED + b"\r\n3;" + b"x" * 70_000,
        OK + CHUNKED + b"\r\n0\r\n" + b"X: y\r\n" * 20_000,
        OK + b"X: " + b" \r\n" * 40_000,
    ],
    ids=["blank lines", "interim responses", "fields", "an extension", "a trailer", "a folded field"],
)
def test_nothing_is_without_end(endless: bytes) -> None:
    with pytest.raises(ProtocolError, match="larger than 64 KB"):
        parse([endless])


@pytest.mark.parametrize(
    ("url", "start"),
    [
        ("http://Example.org/a%2fb/../c?x=%7E&", b"GET /a%2fb/../c?x=%7E& HTTP/1.1\r\nHost: example.org\r\n"),
        ("http://example.org:8080", b"GET / HTTP/1.1\r\nHost: example.org:8080\r\n"),
        ("https://example.org:443/?", b"GET /? HTTP/1.1\r\nHost: example.org\r\n"),
        ("https://example.org:80/", b"GET / HTTP/1.1\r\nHost: example.org:80\r\n"),
        ("http://[::1]:8080/", b"GET / HTTP/1.1\r\nHost: [::1]:8080\r\n"),
        ("http://me:pw@[2001:db8::1]/", b"GET / HTTP/1.1\r\nHost: [2001:db8::1]\r\n"),
    ],
)
def test_a_request(url: str, start: bytes) -> None:
    headers = [("User-Agent", "batchvl"), ("Cookie", "a=k\udce4se")]
    assert encode_request(parse_url(url), headers) == start + b"User-Agent: batchvl\r\nCookie: a=k\xe4se\r\n\r\n"


@pytest.mark.parametrize("header", [("A", "1\r\nB: 2"), ("A", "1\nB: 2"), ("A", "\0"), ("A: 1\r\nB", "2"), ("", "1")])
def test_a_request_has_no_header_that_nobody_set(header: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="header"):
        encode_request(parse_url("http://example.org/"), [header])
