"""Labels and first checks of image references, by the manifest alone."""

from __future__ import annotations

from ..errors import EmptyImage, TooManyBytes, UnsupportedSource
from ..types import FileImage, ImageRef, InlineImage, WebImage

_MAX_LABEL = 1000
"""Characters: a label goes into the output of every row."""


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
    """Return a URL without user, password, fragment and query, which may be secret. The URL need not be valid."""
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


def check_given(image: WebImage | InlineImage, max_bytes: int) -> None:
    """Raise UnsupportedSource, EmptyImage or TooManyBytes if the manifest alone shows that an image is bad."""
    if isinstance(image, WebImage):
        _check_scheme(image)
    elif not image.data:
        raise EmptyImage(f"{source_label(image)}: has no bytes")
    elif len(image.data) > max_bytes:
        size = f"has {len(image.data):,} bytes, more than --max-image-bytes {max_bytes:,}"
        raise TooManyBytes(f"{source_label(image)}: {size}")


def _check_scheme(image: WebImage) -> None:
    scheme, colon, _ = image.url.lstrip().partition(":")
    if scheme.lower() not in ("http", "https"):
        found = f"scheme {scheme[:16]!r}" if colon else "no scheme"
        raise UnsupportedSource(f"{source_label(image)}: found {found}, expected http or https")
