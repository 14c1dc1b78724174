"""Faults in content codings: gzip, deflate, Brotli, Zstandard, and what is none of them (RFC 9110, section 8.4)."""

from __future__ import annotations

import gzip
import importlib.util
import zlib

from .messages import CHUNKED, IMAGE, LAST_CHUNK, answer, chunk, head
from .registry import add, conversation, response
from .server import Exchange


def _coded(
    name: str, coding: str, body: bytes, expected: str = "ok", *, arrives: bytes = IMAGE, curl: bool = True
) -> None:
    response(f"coding_{name}", answer(f"Content-Encoding: {coding}", body=body), expected, body=arrives, curl=curl)


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def _brotli(data: bytes) -> bytes:
    """Wrap data in a Brotli stream of one uncompressed meta-block (RFC 7932, section 9.2); at most 65,536 bytes."""
    # From the lowest bit: a window of 64 KB (1 bit), not the last block (1), 16 bits of length (2), the length less one
    # (16), uncompressed (1). The last block is empty.
    bits = (len(data) - 1) << 4 | 1 << 20
    return bits.to_bytes(3, "little") + data + b"\3"


def _zstandard(data: bytes) -> bytes:
    """Wrap data in a Zstandard frame of one raw block (RFC 8878, section 3.1.1); at most 65,536 bytes."""
    window = (16 - 10) << 3  # 64 KB
    block = len(data) << 3 | 1  # the last one, raw
    return b"\x28\xb5\x2f\xfd" + bytes([0, window]) + block.to_bytes(3, "little") + data


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False


def _verdict(*libraries: str) -> tuple[str, bool]:
    """Return the verdict on a coding that needs one of these libraries, and whether it is that of curl."""
    installed = any(_is_installed(library) for library in libraries)
    return ("ok", True) if installed else ("unsupported_encoding", False)


_GZIPPED = gzip.compress(IMAGE)
_BROTLI, _BROTLI_AS_CURL = _verdict("brotli")
_ZSTD, _ZSTD_AS_CURL = _verdict("backports.zstd", "compression.zstd")

_coded("gzip", "gzip", _GZIPPED)
_coded("x_gzip", "x-gzip", _GZIPPED)
_coded("gzip_in_capitals", "GZIP", _GZIPPED)
_coded("gzip_with_spaces", "  gzip  ", _GZIPPED)
_coded("gzip_stored", "gzip", gzip.compress(IMAGE, 0))
_coded("gzip_with_a_file_name", "gzip", _GZIPPED[:3] + b"\x08" + _GZIPPED[4:10] + b"cat.jpg\0" + _GZIPPED[10:])
_coded("deflate", "deflate", zlib.compress(IMAGE))
_coded("deflate_raw", "deflate", _raw_deflate(IMAGE))
_coded("brotli", "br", _brotli(IMAGE), _BROTLI, curl=_BROTLI_AS_CURL)
_coded("zstd", "zstd", _zstandard(IMAGE), _ZSTD, curl=_ZSTD_AS_CURL)
_HUGE_WINDOW = _zstandard(IMAGE).replace(bytes([0, 6 << 3]), bytes([0, 21 << 3]), 1)  # 2 GB
_coded("zstd_that_needs_2_gb", "zstd", _HUGE_WINDOW, "connection_failed" if _ZSTD == "ok" else _ZSTD)
_coded("identity", "identity", IMAGE)
_coded("empty", "", IMAGE)
_coded("none", "none", IMAGE)
_coded("gzip_twice", "gzip, gzip", gzip.compress(_GZIPPED))
_coded("deflate_then_gzip", "deflate, gzip", gzip.compress(zlib.compress(IMAGE)))
_coded("identity_then_gzip", "identity, gzip", _GZIPPED)
_coded("gzip_ten_times", ", ".join(["gzip"] * 10), _GZIPPED, "unsupported_encoding")
response(
    "coding_in_two_fields",
    answer("Content-Encoding: deflate", "Content-Encoding: gzip", body=gzip.compress(zlib.compress(IMAGE))),
)
response("coding_gzip_in_chunks", head("Content-Encoding: gzip", CHUNKED) + chunk(_GZIPPED) + LAST_CHUNK)
response("coding_gzip_without_length", head("Content-Encoding: gzip") + _GZIPPED, close=True)
response("coding_gzip_for_transfer", head("Transfer-Encoding: gzip, chunked") + chunk(_GZIPPED) + LAST_CHUNK)

_coded("unknown", "foo", IMAGE, "unsupported_encoding")
_coded("compress", "compress", IMAGE, "unsupported_encoding")
_coded("binary", "binary", IMAGE, "unsupported_encoding")
_coded("utf_8", "utf-8", IMAGE, "unsupported_encoding")
_coded("aws_chunked", "aws-chunked", IMAGE, "unsupported_encoding")
_coded("gzip_then_unknown", "gzip, foo", _GZIPPED, "unsupported_encoding")

_coded("gzip_claimed", "gzip", IMAGE, "connection_failed")
_coded("deflate_claimed", "deflate", IMAGE, "connection_failed")
_coded("gzip_cut", "gzip", _GZIPPED[:-300], "connection_failed")
# curl takes what there is. Here a body that ends too early is fetched again, however much of it is there.
_coded("gzip_without_checksum", "gzip", _GZIPPED[:-8], "connection_failed", curl=False)
_coded("gzip_wrong_checksum", "gzip", _GZIPPED[:-8] + bytes(8), "connection_failed")
# curl refuses what follows the end of a gzip stream. Browsers ignore it, and what came before it is complete. Further
# members belong to the content (RFC 1952, section 2.2).
_coded("gzip_and_junk", "gzip", _GZIPPED + b"<!-- cached -->", curl=False)
_coded("gzip_and_zeros", "gzip", _GZIPPED + bytes(100), curl=False)
_coded("gzip_in_members", "gzip", gzip.compress(IMAGE[:1000]) + gzip.compress(IMAGE[1000:]), curl=False)
_coded("gzip_of_nothing", "gzip", gzip.compress(b""), "empty_image", arrives=b"")
_coded("gzip_without_a_byte", "gzip", b"", "empty_image", arrives=b"")
_coded("deflate_cut", "deflate", zlib.compress(IMAGE)[:-300], "connection_failed")


def _zeros(megabytes: int) -> bytes:
    """Return a gzip stream of many zeros, less its checksum."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    # After a full flush, the same block can follow as often as we like.
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return gzip.compress(b"")[:10] + block * megabytes


# curl has no limit on what it decodes; ours is --max-image-bytes.
def _bomb(name: str, coding: str, body: bytes) -> None:
    _coded(f"bomb_{name}", coding, body, "too_many_bytes", curl=False)


_bomb("of_2_mb", "gzip", _zeros(2))
_bomb("of_500_mb", "gzip", _zeros(500))
_bomb("in_a_bomb", "gzip, gzip", gzip.compress(_zeros(500)))


async def _bomb_without_end(exchange: Exchange) -> None:
    packer = zlib.compressobj(wbits=zlib.MAX_WBITS | 16)
    await exchange.send(head("Content-Encoding: gzip", CHUNKED))
    while True:
        if data := packer.compress(bytes(2**20)):
            await exchange.send(chunk(data), pause=0.001)


add("coding_bomb_without_end", "too_many_bytes", _bomb_without_end, curl=False)


# Nothing comes out of these blocks, and neither do they end: what arrives counts as well. curl would go on for hours.
@conversation("too_many_bytes")
async def coding_without_content_or_end(exchange: Exchange) -> None:
    await exchange.send(head("Content-Encoding: gzip", CHUNKED) + chunk(gzip.compress(b"")[:10]))
    while True:
        await exchange.send(chunk(b"\0\0\0\xff\xff" * 13_000), pause=0.001)


# curl takes a stream without its end for a whole one; we ask again.
@conversation(curl=False)
async def coding_gzip_cut_once(exchange: Exchange) -> None:
    body = _GZIPPED[:-300] if exchange.number == 1 else _GZIPPED
    await exchange.send(answer("Content-Encoding: gzip", body=body))
