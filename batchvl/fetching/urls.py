"""URLs as they are requested: parsed once, and sent as they are written.

Hosts that serve signed URLs compute the signature over the request target as it was sent, so a `Target` has it as it is
written. The errors raised here have texts without the image's name, and quote nothing of a URL but its scheme.
"""

from __future__ import annotations

import re
from base64 import b64encode
from functools import lru_cache
from ipaddress import IPv6Address
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes

from yarl import URL

from ..errors import InvalidUrl, UnsupportedSource

PORTS = {"http": 80, "https": 443}
_CACHED_AUTHORITIES = 16_384

_AFTER_SCHEME = re.compile(r"//([^/?#]+)([^#]*)")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,62})"
_PLAIN = re.compile(rf"((?:{_LABEL}\.)*{_LABEL})(?::([1-9][0-9]{{0,3}}))?", re.IGNORECASE | re.ASCII)
"""An authority of a plain name or IPv4 address, perhaps with a port: nearly all of them."""
_HOST = re.compile(r"[a-z0-9._~!$&'()*+,;=%-]+")  # RFC 3986, section 3.2.2, reg-name; in lower case
_LEGAL = "!$%&'()*+,-./:;=?@[]_~"  # RFC 3986, appendix A; brackets too, since browsers send these as they are
_TARGET = re.compile(rf"[A-Za-z0-9{re.escape(_LEGAL)}]*")
_REMOVED = str.maketrans("", "", "\t\r\n")  # as browsers do (WHATWG URL, section 4.4): text wrapped in a page's source


class Target(NamedTuple):
    """Where to send a request, and what for."""

    netloc: str
    """Host, in brackets if it is an IPv6 address, and the port if it is not the scheme's."""
    scheme: str
    """"http" or "https", or that of an object store."""
    host: str
    """To be looked up and named in messages: in lower case, IDNA-encoded, without brackets."""
    port: int
    target: str
    """Path and query, as sent: the request target in origin form (RFC 9112, section 3.2.1)."""
    key: str
    """The URL with user and password, without fragment: equal for requests that are the same. May hold secrets."""
    origin: str
    """Host and port: what requests are paced by."""
    authorization: str | None
    """Value of the Authorization header, from the user and password of the URL."""

    @property
    def url(self) -> URL:
        """The URL without user, password and fragment. yarl would rewrite escapes, so it is marked as encoded."""
        path, _, query = self.target.partition("?")
        # yarl has no empty query: it is sent as the end of the path.
        path = path if query else self.target
        return URL.build(scheme=self.scheme, authority=self.netloc, path=path, query_string=query, encoded=True)


class _Authority(NamedTuple):
    netloc: str
    """Host, and the port if it is not the default."""
    user_info: str
    """User and password as written, with "@"; may be empty."""
    host: str
    port: int
    origin: str
    authorization: str | None


def parse_url(text: str) -> Target:
    """Parse the URL of an image.

    Path and query stay as they are written, percent-escapes, dot segments and an empty query included. Only characters
    that no request target may have are encoded, non-ASCII ones as UTF-8. White space around the URL is ignored, and so
    are tabs and line breaks within it. The host may be any text that could be a name or an address: whether it may be
    connected to is for the `NetworkGuard` to say, who sees the address.

    >>> parse_url("HTTP://me:pw@Example.org:80/a%2fb/../c d?#top").target
    '/a%2fb/../c%20d?'

    Raises:
        UnsupportedSource: The scheme is not http or https.
        InvalidUrl: Anything else is wrong.
    """
    scheme, colon, rest = text.strip().partition(":")
    lower_case = scheme.lower()
    if lower_case not in PORTS:
        found = f"scheme {scheme[:16]!r}" if colon else "no scheme"
        raise UnsupportedSource(f"found {found}, expected http or https")
    try:
        return _parse(lower_case, rest if rest.isprintable() else rest.translate(_REMOVED))
    except ValueError:
        raise InvalidUrl("not a valid URL") from None


def resolve_redirect(base: Target, location: str) -> Target:
    """Return where a redirect leads (RFC 3986, section 5.2).

    A location with a host goes as it is written, as in `parse_url`. Relative ones lose their dot segments. The user and
    the password of `base` are kept for the same scheme, host and port, and for no others.

    Args:
        base: The URL that was requested.
        location: Value of the Location header. Bytes that are not UTF-8 are surrogate escapes, which are
            percent-encoded.

    >>> resolve_redirect(parse_url("http://example.org/a/b?x"), "../c%2f?y").key
    'http://example.org/c%2f?y'

    Raises:
        UnsupportedSource: The scheme is not http or https.
        InvalidUrl: The location is not a URL.
    """
    reference = location.strip().translate(_REMOVED)
    match = _SCHEME.match(reference)
    scheme = match[1].lower() if match else base.scheme
    if scheme not in PORTS:
        raise UnsupportedSource("redirects to a URL that is neither http nor https")
    rest = reference[match.end() :] if match else reference
    try:
        if rest.startswith("//"):
            target = _parse(scheme, rest)
            is_same = (scheme, target.origin) == (base.scheme, base.origin)
            return _sibling(base, target.target) if is_same and target.authorization is None else target
        if scheme != base.scheme:
            raise ValueError("no host")
        return _sibling(base, _merge(base.target, _encode(rest.partition("#")[0])))
    except ValueError:
        raise InvalidUrl("redirects to an invalid URL") from None


def _parse(scheme: str, rest: str) -> Target:
    """Parse what follows "http:". Raises ValueError."""
    match = _AFTER_SCHEME.match(rest)
    if match is None:
        raise ValueError("no host")
    netloc, user_info, host, port, origin, authorization = _parse_authority(scheme, match[1])
    target = _encode(match[2])
    if target[:1] != "/":
        target = "/" + target
    key = f"{scheme}://{user_info}{netloc}{target}"
    return Target(netloc, scheme, host, port, target, key, origin, authorization)


def _sibling(base: Target, target: str) -> Target:
    """Return another target of the same host, with the same user and password."""
    return base._replace(target=target, key=base.key.removesuffix(base.target) + target)


def _encode(target: str) -> str:
    """Percent-encode what no request target may have; a lone "%" stays, as curl has it."""
    return target if _TARGET.fullmatch(target) else quote(target, safe=_LEGAL, errors="surrogateescape")


@lru_cache(_CACHED_AUTHORITIES)
def _parse_authority(scheme: str, authority: str) -> _Authority:
    if match := _PLAIN.fullmatch(authority):
        user_info, host, port = "", match[1].lower(), int(match[2] or PORTS[scheme])
    elif "\\" in authority:
        raise ValueError("a backslash, which browsers take for the end of the host")
    else:
        user_info, at, host_port = authority.rpartition("@")
        user_info += at
        host, port = _parse_host_port(scheme, host_port)
    bracketed = f"[{host}]" if ":" in host else host
    netloc = bracketed if port == PORTS[scheme] else f"{bracketed}:{port}"
    return _Authority(netloc, user_info, host, port, f"{bracketed.rstrip('.')}:{port}", _authorization(user_info))


def _parse_host_port(scheme: str, text: str) -> tuple[str, int]:
    """Parse any host, as it is looked up. Raises ValueError."""
    parsed = URL(f"{scheme}://{text}")  # IDNA, IPv6
    host, port = parsed.raw_host or "", parsed.explicit_port
    if text.startswith("["):
        IPv6Address(host.partition("%")[0])
    elif not _HOST.fullmatch(host) or not all(0 < len(part) < 64 for part in host.removesuffix(".").split(".")):
        raise ValueError("neither a name nor an address")
    if port is None:
        return host, PORTS[scheme]
    if port == 0 or not re.fullmatch("[0-9]+", text.rpartition(":")[2]):
        raise ValueError("not a port")
    return host, port


def _authorization(user_info: str) -> str | None:
    """Return the header for basic authentication (RFC 7617), in UTF-8."""
    user, _, password = user_info.removesuffix("@").partition(":")
    if not user and not password:
        return None
    return "Basic " + b64encode(unquote_to_bytes(user) + b":" + unquote_to_bytes(password)).decode("ascii")


def _merge(base: str, reference: str) -> str:
    """Resolve a reference without a host against a request target (RFC 3986, section 5.2.2)."""
    base_path, base_mark, base_query = base.partition("?")
    path, mark, query = reference.partition("?")
    if not path:
        return base_path + (mark + query if mark else base_mark + base_query)
    if path[0] != "/":
        path = base_path[: base_path.rindex("/") + 1] + path
    return _without_dot_segments(path) + mark + query


def _without_dot_segments(path: str) -> str:
    """Remove "." and ".." from an absolute path (RFC 3986, section 5.2.4)."""
    if "/." not in path:
        return path
    segments, kept = path.split("/")[1:], list[str]()
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)
