"""Files of the Hugging Face Hub, `hf://datasets/ORG/NAME/PATH`: where they are on the web, and with which token.

The Hub serves files over HTTP, with redirects to where large ones are stored. So such a file is fetched as any image of
the web is, and needs no library.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, unquote

from ..errors import InvalidUrl, OptionError, RowError
from .object_urls import UNREADABLE, BucketGuard
from .urls import Target, parse_url

_ENDPOINT = "https://huggingface.co"
_URL = re.compile(
    r"hf://(datasets/|spaces/|models/|(?!datasets/|spaces/|models/|buckets/|kernels/))([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)


class Hub:
    """The Hub of HF_ENDPOINT, by default huggingface.co.

    The token of the environment (HF_TOKEN, or the file of HF_TOKEN_PATH, or that of `hf auth login`) is sent to it for
    repositories that the guard allows. Other repositories are read as anybody may read them.

    Raises:
        OptionError: HF_ENDPOINT is not a URL.
    """

    def __init__(self, guard: BucketGuard) -> None:
        self._guard = guard
        self._endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _ENDPOINT
        try:
            parse_url(self._endpoint)
        except RowError as error:
            raise OptionError(f"HF_ENDPOINT: {error}") from None
        token = _read_token()
        self._authorization = f"Bearer {token}" if token else None

    def target(self, text: str) -> Target:
        """Return where a file is requested, from its URL `hf://[datasets/|spaces/]ORG/NAME[@REVISION]/PATH`.

        The path is as written: "?", "#" and "%" are part of it. In a revision, slashes are "%2F".

        >>> Hub(BucketGuard()).target("hf://datasets/me/cats@v1/a b.png").target
        '/datasets/me/cats/resolve/v1/a%20b.png'

        Raises:
            InvalidUrl: It is not such a URL.
        """
        match = _URL.fullmatch(text)
        if match is None or not UNREADABLE.isdisjoint((*match[2].split("/"), match[3] or "main", *match[4].split("/"))):
            raise InvalidUrl("expected hf://datasets/ORG/NAME/PATH or hf://datasets/ORG/NAME@REVISION/PATH")
        kind, repository, revision = match[1].lower(), match[2], unquote(match[3] or "main")
        kind = "" if kind == "models/" else kind
        path = f"{quote(revision, safe='')}/{quote(match[4], errors='surrogateescape')}"
        target = parse_url(f"{self._endpoint}/{kind}{repository}/resolve/{path}")
        if self._authorization is None or not self._guard.allows(f"hf://{kind}{repository}"):
            return target
        # Another key than that of the same URL without the token, for which there may be another answer.
        key = target.key.replace("://", "://hf@", 1)
        return target._replace(authorization=self._authorization, key=key)


def _read_token() -> str | None:
    """Return the token of this user, where the Hub's own tools keep it."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = os.environ.get("HF_HOME", f"{cache}/huggingface")
    path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, ValueError):
        return None
