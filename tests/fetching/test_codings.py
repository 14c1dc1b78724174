"""Bodies are decoded in bounded memory, whatever the coding and however they arrive."""

from __future__ import annotations

import gzip
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.errors import ConnectionFailed, FetchError, TooManyBytes, UnsupportedEncoding
from batchvl.fetching.codings import ACCEPT_ENCODING, PIECE_BYTES, BodyDecoder
from batchvl.fetching.http import TransientError
from tests.fuzzing import examples

MB = 2**20
IMAGE = random.Random(1).randbytes(3000) * 50
"""Compressible, larger than a piece."""


def _library(*names: str) -> ModuleType | None:
    for name in names:
        try:
            return import_module(name)
        except ImportError:
            continue
    return None


BROTLI = _library("brotli")
ZSTD = _library("compression.zstd", "backports.zstd")
needs_brotli = pytest.mark.skipif(BROTLI is None, reason="brotli is not installed")
needs_zstd = pytest.mark.skipif(ZSTD is None, reason="backports.zstd is not installed")


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def _brotli(data: bytes) -> bytes:
    assert BROTLI is not None
    return bytes(BROTLI.compress(data, quality=5))


def _zstd(data: bytes) -> bytes:
    assert ZSTD is not None
    return bytes(ZSTD.compress(data))


ENCODERS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "stored": ("gzip", lambda data: gzip.compress(data, 0, mtime=0)),
    "members": (
        "gzip",
        lambda data: gzip.compress(data[:70_000], mtime=0) + gzip.compress(b"") + gzip.compress(data[70_000:]),
    ),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", _raw_deflate),
    "gzip twice": ("gzip, gzip", lambda data: gzip.compress(gzip.compress(data), mtime=0)),
    "deflate in gzip": ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data), mtime=0)),
    "brotli": ("br", _brotli),
    "zstd": ("zstd", _zstd),
    "frames": ("zstd", lambda data: _zstd(data[:70_000]) + _zstd(b"") + _zstd(data[70_000:])),
    "gzip in zstd": ("gzip, zstd", lambda data: _zstd(gzip.compress(data, mtime=0))),
}
MARKS = {"brotli": needs_brotli, "zstd": needs_zstd, "frames": needs_zstd, "gzip in zstd": needs_zstd}
each_coding = pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in ENCODERS])


def decode(content_encoding: str, chunks: Iterable[bytes], limit: int = 10 * MB) -> bytes:
    decoder = BodyDecoder(content_encoding, limit)
    body = b"".join(piece for chunk in chunks for piece in decoder.feed(chunk))
    decoder.finish()
    return body


def error_of(content_encoding: str, *chunks: bytes, limit: int = 10 * MB) -> FetchError | TransientError:
    with pytest.raises((FetchError, TransientError)) as caught:
        decode(content_encoding, chunks, limit)
    assert isinstance(caught.value, FetchError | TransientError)
    return caught.value


def assert_connection_failed(error: FetchError | TransientError, text: str) -> None:
    assert isinstance(error, TransientError)
    assert type(error.error) is ConnectionFailed
    assert text in str(error)


def one_at_a_time(data: bytes) -> Iterable[bytes]:
    return (data[index : index + 1] for index in range(len(data)))


@each_coding
def test_bodies_are_decoded(name: str) -> None:
    header, encode = ENCODERS[name]
    assert decode(header, [encode(IMAGE)]) == IMAGE
    assert decode(header, one_at_a_time(encode(IMAGE))) == IMAGE
    assert decode(header, [encode(b"")]) == b""


@each_coding
@settings(max_examples=examples(15), deadline=None)
@given(data=st.data())
def test_chunks_of_any_size_are_decoded(name: str, data: Any) -> None:
    header, encode = ENCODERS[name]
    body = encode(IMAGE)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=6)))
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert decode(header, chunks) == IMAGE


@pytest.mark.parametrize("header", ["", " ", "identity", "Identity", "none", "identity, identity"])
def test_no_coding(header: str) -> None:
    decoder = BodyDecoder(header, 5)
    assert decoder.codings == ()
    assert list(decoder.feed(b"abc")) + list(decoder.feed(b"de")) == [b"abc", b"de"]
    with pytest.raises(TooManyBytes, match=r"^has more bytes than --max-image-bytes 5$"):
        list(decoder.feed(b"f"))


@pytest.mark.parametrize(
    ("header", "codings"),
    [
        ("GZIP", ("gzip",)),
        (" x-gzip ", ("gzip",)),
        ("gzip,", ("gzip",)),
        ("identity, deflate", ("deflate",)),
        ("deflate,gzip", ("deflate", "gzip")),
    ],
)
def test_headers(header: str, codings: tuple[str, ...]) -> None:
    assert BodyDecoder(header, 1).codings == codings


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("compress", "the server encoded the image as 'compress', which is not supported"),
        ("gzip, Foo", "the server encoded the image as 'foo', which is not supported"),
        ("x" * 5000, f"the server encoded the image as '{'x' * 20}', which is not supported"),
        ("gzip, gzip, gzip", "the server encoded the image 3 times, more than 2"),
    ],
)
def test_other_codings_are_refused_at_once(header: str, message: str) -> None:
    with pytest.raises(UnsupportedEncoding) as caught:
        BodyDecoder(header, 1)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("coding", "modules"), [("br", ["brotli"]), ("zstd", ["compression", "compression.zstd", "backports.zstd"])]
)
def test_a_coding_without_its_library_is_refused(
    coding: str, modules: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)  # its import fails
    with pytest.raises(UnsupportedEncoding, match=rf"as '{coding}': install batchvl\[codings\]"):
        BodyDecoder(coding, 1)


@each_coding
@pytest.mark.parametrize("lost", [1, 4, 300])
def test_a_truncated_body_is_worth_a_retry(name: str, lost: int) -> None:
    header, encode = ENCODERS[name]
    assert_connection_failed(error_of(header, encode(IMAGE)[:-lost]), "ends too early")


@each_coding
def test_an_empty_body_decodes_to_nothing(name: str) -> None:
    assert decode(ENCODERS[name][0], [b"", b""]) == b""


@pytest.mark.parametrize("body", [b"\x1f", b"\x1f\x8b", gzip.compress(IMAGE, mtime=0)[:12]])
def test_a_beginning_alone_is_truncated(body: bytes) -> None:
    assert_connection_failed(error_of("gzip", *one_at_a_time(body)), "ends too early")


@pytest.mark.parametrize("name", ["gzip", "deflate", pytest.param("br", marks=needs_brotli), "zstd"])
@pytest.mark.parametrize("body", [b"\xff\xd8\xff\xe0 a JPEG, not encoded", b"\x89PNG\r\n\x1a\n" + IMAGE])
def test_what_is_not_in_the_coding_is_garbled(name: str, body: bytes) -> None:
    if name == "zstd" and ZSTD is None:
        pytest.skip("backports.zstd is not installed")
    error = error_of(name, body)
    assert_connection_failed(error, f"garbled: it is not valid {name}")
    assert "JPEG" not in str(error)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("gzip", gzip.compress(IMAGE, mtime=0)[:-8] + bytes(8)),
        ("deflate", zlib.compress(IMAGE)[:-4] + bytes(4)),
        ("deflate", gzip.compress(IMAGE, mtime=0)),
        ("gzip", zlib.compress(IMAGE)),
        ("gzip", gzip.compress(IMAGE, mtime=0) + b"\x1f\x8b\x08 and no member"),
    ],
)
def test_wrong_checksums_and_formats_are_garbled(header: str, body: bytes) -> None:
    assert_connection_failed(error_of(header, body), "garbled")


def test_raw_deflate_that_has_the_check_bits_of_zlib() -> None:
    image = b"x" * 23
    stored = b"\1" + len(image).to_bytes(2, "little") + (len(image) ^ 0xFFFF).to_bytes(2, "little") + image
    assert int.from_bytes(stored[:2], "big") % 31 == 0
    assert decode("deflate", [stored]) == image


@pytest.mark.parametrize("junk", [b"<!-- cached -->", bytes(100), b"\x1f", b"\x1f\x8b", b"\x28\xb5"])
@pytest.mark.parametrize("name", ["gzip", "deflate", "raw deflate", pytest.param("zstd", marks=needs_zstd)])
def test_junk_after_the_end_is_ignored(name: str, junk: bytes) -> None:
    header, encode = ENCODERS[name]
    assert decode(header, [encode(IMAGE) + junk]) == IMAGE
    assert decode(header, [encode(IMAGE), *one_at_a_time(junk), b"more"]) == IMAGE


@each_coding
def test_the_limit_is_exact(name: str) -> None:
    header, encode = ENCODERS[name]
    body = encode(IMAGE)
    assert decode(header, [body], len(IMAGE)) == IMAGE
    error = error_of(header, body, limit=len(IMAGE) - 1)
    assert type(error) is TooManyBytes
    assert str(error) == f"has more bytes than --max-image-bytes {len(IMAGE) - 1:,} after decoding"


def test_junk_without_end_is_too_much() -> None:
    error = error_of("gzip", gzip.compress(b"image", mtime=0), *[bytes(MB)] * 10, limit=MB)
    assert type(error) is TooManyBytes


def _zeros(megabytes: int) -> bytes:
    """Return a gzip stream of zeros, less its checksum."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(MB)) + packer.flush(zlib.Z_FULL_FLUSH)  # after a full flush, it can be repeated
    return gzip.compress(b"", mtime=0)[:10] + block * megabytes


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip": ("gzip", lambda: _zeros(200)),
    "gzip in gzip": ("gzip, gzip", lambda: gzip.compress(_zeros(200), mtime=0)),
    "zeros before the second coding": ("deflate, gzip", lambda: _zeros(200)),
    "brotli": ("br", lambda: _brotli(bytes(100 * MB))),
    "zstd": ("zstd", lambda: _zstd(bytes(100 * MB))),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in BOMBS])
def test_bombs_do_not_take_memory(name: str) -> None:
    header, make = BOMBS[name]
    bomb, limit, decoded, largest = make(), 5 * MB, 0, 0
    decoder = BodyDecoder(header, limit)
    tracemalloc.start()
    try:
        try:
            for piece in decoder.feed(bomb):
                decoded, largest = decoded + len(piece), max(largest, len(piece))
            pytest.fail("the bomb was decoded")
        except (TooManyBytes, TransientError):
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoded <= limit
    assert largest <= 2 * PIECE_BYTES
    assert peak < 2 * len(bomb) + 16 * PIECE_BYTES


@needs_zstd
def test_a_large_window_of_zstandard_is_refused() -> None:
    assert ZSTD is not None
    options = {ZSTD.CompressionParameter.window_log: 24}  # 16 MB
    packer = ZSTD.ZstdCompressor(options=options)
    body = packer.compress(IMAGE) + packer.flush()
    assert_connection_failed(error_of("zstd", body), "garbled")


def test_no_coding_is_asked_for() -> None:
    assert ACCEPT_ENCODING == "identity"
