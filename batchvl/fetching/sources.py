"""Labels and first checks of image references, by the manifest alone."""

from __future__ import annotations

import re
from typing import TypeVar

from ..config.options import ImageOptions
from ..errors import EmptyImage, RowError, TooManyBytes, TooManyImages
from ..types import FileImage, ImageRef, InlineImage, WebImage

Error = TypeVar("Error", bound=RowError)

MAX_MESSAGE = 300
"""Characters of an error message."""
_OBJECT = re.compile(r"(s3|gs|gcs|hf|abfss?|az)://([^/]*)(.*)", re.IGNORECASE | re.DOTALL)
_CONTAINER = re.compile(r"[a-z0-9$-]{3,63}@[a-z0-9.-]+\.core\.[a-z.]+")
"""What is before "@" is the name of a container of Azure, and no secret."""
_SIGNATURE = re.compile(r"\?[^/]*\bsig=.*", re.DOTALL)
_MAX_LABEL = 1000
"""Characters: a label goes into the output of every row."""
_MAX_NAME = 180
"""Characters of a label in a message."""


def source_label(image: ImageRef) -> str:
    """Return the name of an image's source in messages and in the output, which never holds a secret.

    >>> source_label(WebImage("https://me:secret@example.org/cat.jpg?token=abc#x"))
    'https://example.org/cat.jpg?…'
    """
    if isinstance(image, WebImage):
        label = url_label(image.url)
        if not label.isprintable():
            label = "".join(character if character.isprintable() else "\ufffd" for character in label)
    elif isinstance(image, FileImage):
        label = image.path
    else:
        label = image.source
    return label if len(label) <= _MAX_LABEL else label[:_MAX_LABEL] + "…"


def url_label(url: str) -> str:
    """Return a URL without user, password, fragment and query, which may be secret. The URL need not be valid.

    URLs of object stores have neither fragment nor query: their keys may contain "?" and "#". Only what has a signature
    of Azure is taken for a query.

    >>> url_label("https://me:secret@example.org/cat.jpg?token=abc#x"), url_label("s3://KEY:SECRET@night/cat.jpg?a#b")
    ('https://example.org/cat.jpg?…', 's3://night/cat.jpg?a#b')
    """
    if match := _OBJECT.match(url.strip()):
        bucket = match[2] if _CONTAINER.fullmatch(match[2]) else match[2].rpartition("@")[2]
        return f"{match[1]}://{bucket}{_SIGNATURE.sub('?…', match[3])}"
    head, query, _ = url.strip().partition("?")
    head = head.partition("#")[0]
    scheme, slashes, rest = head.partition("://")
    if not slashes:
        return head.rpartition("@")[2] + ("?…" if query else "")
    authority, slash, path = rest.partition("/")
    authority = authority.rpartition("@")[2]
    _, colon, port = authority.rpartition(":")
    if colon and not authority.endswith("]") and not port.isdigit():
        return f"{scheme}://…"  # not a port: perhaps a password that contains one of / ? #
    return f"{scheme}://{authority}{slash}{path}" + ("?…" if query else "")


def check_inline(image: InlineImage, max_bytes: int) -> None:
    """Raise EmptyImage or TooManyBytes if an image has no bytes or too many."""
    if not image.data:
        raise EmptyImage(f"{source_label(image)}: has no bytes")
    if len(image.data) > max_bytes:
        size = f"has {len(image.data):,} bytes, more than --max-image-bytes {max_bytes:,}"
        raise TooManyBytes(f"{source_label(image)}: {size}")


def check_count(count: int, limits: ImageOptions) -> None:
    """Raise TooManyImages if a row with `count` images has more than --max-images."""
    if count > limits.max_images:
        raise TooManyImages(f"{count} images in the row, at most {limits.max_images} are allowed (--max-images)")


def named(error: Error, name: str, note: str = "") -> Error:
    """Return an error whose text begins with the name of the image, at most `MAX_MESSAGE` characters long.

    Args:
        error: Error without the name.
        name: Name of the image; a long one is cut.
        note: Text for the end.

    >>> from batchvl.errors import HttpStatus
    >>> str(named(HttpStatus("HTTP status 404"), "http://example.org/cat.jpg", " (after 2 attempts)"))
    'http://example.org/cat.jpg: HTTP status 404 (after 2 attempts)'
    """
    if len(name) > _MAX_NAME:
        name = name[:_MAX_NAME] + "…"
    text = f"{name}: {error}"
    if len(text) + len(note) > MAX_MESSAGE:
        text = text[: MAX_MESSAGE - len(note) - 1] + "…"
    return type(error)(text + note)
