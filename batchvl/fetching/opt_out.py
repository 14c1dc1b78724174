"""Opting out of use for AI: the X-Robots-Tag header of a response."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

HEADER = "X-Robots-Tag"
OPT_OUTS = frozenset({"noai", "noimageai"})

_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
"""Directives that are followed by a colon and a value, as names of agents are by directives."""
_AGENT = re.compile(r"[a-z*][^\s:]*")


def opt_out_of(
    headers: Iterable[tuple[str, str]], agent: str = "batchvl", opt_outs: Collection[str] = OPT_OUTS
) -> str | None:
    """Return the directive by which a response opts its image out of use for AI, None if there is none.

    The value of a header is a list of directives, for all agents or, after `name:`, for the named one. Several headers
    count together.

    Args:
        headers: Names and values of the response's headers.
        agent: The name of this one, in lower case.
        opt_outs: Directives that opt out, in lower case.

    >>> opt_out_of([("X-Robots-Tag", "noindex, NoAI")])
    'noai'
    >>> opt_out_of([("X-Robots-Tag", "otherbot: noindex, noai")]) is None
    True
    """
    for name, value in headers:
        if len(name) == len(HEADER) and name.lower() == HEADER.lower():
            directive = _find(value.lower(), agent, opt_outs)
            if directive is not None:
                return directive
    return None


def _find(value: str, agent: str, opt_outs: Collection[str]) -> str | None:
    is_addressed = True
    for part in value.split(","):
        head, colon, rest = (text.strip() for text in part.partition(":"))
        directive = head
        # A time within the date of unavailable_after has a colon too: it begins with a digit, or follows a space.
        if colon and head not in _WITH_VALUE and _AGENT.fullmatch(head):
            is_addressed, directive = head in (agent, "*"), rest
        if is_addressed and directive in opt_outs:
            return directive
    return None
