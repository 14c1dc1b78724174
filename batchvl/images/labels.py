"""What a picture's source is called in the output and in messages: never with a secret in it."""

from __future__ import annotations

from ..types import FileImage, ImageRef, WebImage

_LONGEST = 1000  # characters: a label goes into every row's output


def source_label(image: ImageRef) -> str:
    """A URL without user, password, fragment and the query's values; a path as given; of inline data its `source`.

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
    return label if len(label) <= _LONGEST else label[:_LONGEST] + "…"


def url_label(url: str) -> str:
    """A URL without what may be secret; it need not be a valid one."""
    head, query, _ = url.strip().partition("?")
    head = head.partition("#")[0]
    scheme, slashes, rest = head.partition("://")
    if not slashes:
        return head.rpartition("@")[2] + ("?…" if query else "")
    authority, slash, path = rest.partition("/")
    authority = authority.rpartition("@")[2]
    _, colon, port = authority.rpartition(":")
    if colon and not authority.endswith("]") and not port.isdigit():
        return f"{scheme}://…"  # no port: perhaps a password that holds one of / ? #
    return f"{scheme}://{authority}{slash}{path}" + ("?…" if query else "")
