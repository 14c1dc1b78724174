"""Parts of HTTP messages, well formed unless said otherwise, and the images in them."""

from __future__ import annotations

import io

from PIL import Image

MAX_IMAGE_BYTES = 2**20
"""The --max-image-bytes that the verdicts assume."""
SECRET = b"s3cr3t"
"""In every body that is no image, and in some URLs: no message may quote it."""


def _jpeg(angle: int) -> bytes:
    bands = [Image.radial_gradient("L").rotate(angle + 90 * band) for band in range(3)]
    file = io.BytesIO()
    Image.merge("RGB", bands).resize((160, 120)).save(file, "JPEG", quality=95)
    return file.getvalue()


IMAGE = _jpeg(10)
"""What a row should get."""
DECOY = _jpeg(40)
"""An image that no row asked for."""
PAGE = b"<!DOCTYPE html><html><title>Not here</title><p>" + SECRET + b"</p></html>"


def head(*fields: str | bytes, status: str = "200 OK", version: str = "HTTP/1.1", end: bytes = b"\r\n") -> bytes:
    """Return a status line and header fields, each as it is given."""
    lines = [f"{version} {status}".encode(), *(f.encode() if isinstance(f, str) else f for f in fields), b""]
    return end.join(lines) + end


def length(body: bytes) -> str:
    return f"Content-Length: {len(body)}"


def answer(*fields: str | bytes, body: bytes = IMAGE, status: str = "200 OK", version: str = "HTTP/1.1") -> bytes:
    """Return a whole response."""
    return head(length(body), "Content-Type: image/jpeg", *fields, status=status, version=version) + body


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%s\r\n%s\r\n" % (len(data), extension, data)


CHUNKED = "Transfer-Encoding: chunked"
LAST_CHUNK = b"0\r\n\r\n"


def redirect(*fields: str | bytes, status: str = "302 Found") -> bytes:
    """Return a redirect whose fields include its Location."""
    return answer(*fields, body=PAGE, status=status)
