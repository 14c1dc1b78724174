"""Decoding of data URIs."""

from __future__ import annotations

import base64

import pytest

from batchvl.errors import InvalidDataUri
from batchvl.manifest.image_refs import decode_data_uri


@pytest.mark.parametrize(
    ("uri", "data", "source"),
    [
        ("data:image/png;base64," + base64.b64encode(b"abcd").decode(), b"abcd", "data:image/png (4 bytes)"),
        ("DATA:image/PNG;charset=x;BASE64,YWJj\r\n ZGU=", b"abcde", "data:image/png (5 bytes)"),
        ("data:image/png;base64,YWJj%0AZGU%3D", b"abcde", "data:image/png (5 bytes)"),
        ("data:,a%20b+c", b"a b+c", "data: (5 bytes)"),
        ("data:text/plain,%FF,", b"\xff,", "data:text/plain (2 bytes)"),
        ("data:image/png;base64,", b"", "data:image/png (0 bytes)"),
    ],
)
def test_valid_data_uris(uri: str, data: bytes, source: str) -> None:
    assert decode_data_uri(uri) == (data, source)


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "data",
        "http://x",
        "data:image/png;base64",
        "data:image/png;base64,YWJjZA",
        "data:;base64,YW=Jj",
        "data:;base64,YWJj!",
        "data:;base64,YWJj====",
        "data:;base64,_-__",
        "data:,%",
        "data:,%zz",
        "data:;base64,é",
    ],
)
def test_invalid_data_uris(uri: str) -> None:
    with pytest.raises(InvalidDataUri):
        decode_data_uri(uri)


def test_the_message_does_not_repeat_a_long_uri() -> None:
    with pytest.raises(InvalidDataUri) as failed:
        decode_data_uri("data:image/png;base64," + "A" * 100_001)
    assert len(str(failed.value)) < 200
