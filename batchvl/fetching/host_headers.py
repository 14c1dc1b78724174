"""Headers for the requests to certain hosts, such as bearer tokens, from the file of --host-headers.

The file is the operator's; URLs come from a manifest that anybody may have written, and from redirects. Each request is
matched anew by the scheme, host and port that it goes to, so no header gets to a host that the file does not name.
"""

from __future__ import annotations

import logging
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FetchError, OptionError
from .urls import PORTS, Target, parse_url

logger = logging.getLogger(__name__)

_OWN = {
    "accept-encoding",
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
}
"""Headers that say how this client reads the response, or for which there is an option."""
_HOST = re.compile(r"(?:(?P<scheme>https?)://)?(?P<wildcard>\*\.)?(?P<host>[^\s/?#@*\\]+)/?", re.IGNORECASE)
_NAME = re.compile(r"[!#$%&'+.^_`|~0-9A-Za-z-]+")  # RFC 9110, section 5.6.2
_VALUE = re.compile(r"[!-~](?:[\t -~]*[!-~])?")  # RFC 9110, section 5.5: ASCII without white space around it

_Key = tuple[str, bool, str]
"""Scheme, whether all names below are meant, and host and port."""


class HostHeaders:
    """The headers of each host.

    Args:
        tables: By the name of a host, the values of its headers. A host is `images.example.org`, which is https at its
            default port; `images.example.org:8443`; `http://images.example.org` for http; or `*.example.org` for all
            names below.

    Attributes:
        tables: The same.

    Raises:
        OptionError: A host or a header is not valid. No error quotes a value.

    >>> headers = HostHeaders({"images.example.org": {"authorization": "Bearer s3cret"}})
    >>> headers.headers_for(parse_url("https://images.example.org/cat.jpg"))
    {'Authorization': 'Bearer s3cret'}
    >>> headers.headers_for(parse_url("https://images.example.org:8443/cat.jpg"))
    {}
    """

    def __init__(self, tables: Mapping[str, Any]) -> None:
        self.tables = tables
        self._headers: dict[_Key, dict[str, str]] = {}
        self._warned: set[str] = set()
        for host, table in tables.items():
            key = _parse_host(host)
            if key in self._headers:
                raise OptionError(f"--host-headers: {host!r} is there twice, in different spellings")
            self._headers[key] = _parse_headers(host, table)

    @classmethod
    def read(cls, path: str | os.PathLike[str] | None) -> HostHeaders:
        """Return the headers of a TOML file, which has a table for each host; none if there is no file.

        Raises:
            OptionError: The file cannot be read, or is not valid.
        """
        if path is None:
            return cls({})
        file = Path(path)
        try:
            tables = tomllib.loads(file.read_text(encoding="utf-8"))
            is_exposed = file.stat().st_mode & 0o077
        except OSError as error:
            raise OptionError(f"--host-headers: cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise OptionError(f"--host-headers: {file} is not UTF-8") from None
        except tomllib.TOMLDecodeError as error:
            raise OptionError(f"--host-headers: {file} is not valid TOML: {error}") from None
        if is_exposed:
            logger.warning(f"{file} can be read by others, and may have secrets: chmod 600 {file}")
        if not tables:  # as a pipe is that a check of the options has read before
            raise OptionError(
                f"--host-headers: {file} is empty; expected a file, and no pipe, with a table for each host"
            )
        return cls(tables)

    def headers_for(self, target: Target) -> Mapping[str, str]:
        """Return the headers for a request: those of the most specific entry alone."""
        if not self._headers:
            return {}
        if (headers := self._find(target.scheme, target.origin)) is not None:
            return headers
        if target.scheme == "http" and target.origin not in self._warned:
            self._warn(target)
        return {}

    def _find(self, scheme: str, origin: str) -> dict[str, str] | None:
        if (headers := self._headers.get((scheme, False, origin))) is not None:
            return headers
        parent = origin
        while "." in parent:
            parent = parent.partition(".")[2]
            if (headers := self._headers.get((scheme, True, parent))) is not None:
                return headers
        return None

    def _warn(self, target: Target) -> None:
        """Say once if a host would get its headers over https, and does not over http."""
        self._warned.add(target.origin)
        host, _, port = target.origin.rpartition(":")
        origin = f"{host}:{PORTS['https']}" if int(port) == PORTS["http"] else target.origin
        if self._find("https", origin) is not None:
            logger.warning(
                f"--host-headers: not sent to {target.netloc} over http, where others can read them; "
                f'name it "http://{target.netloc}" to send them all the same'
            )


def _parse_host(text: str) -> _Key:
    expected = (
        'a host such as "images.example.org", "images.example.org:8443", "*.example.org" or "http://localhost:8000"'
    )
    if "@" in text:
        raise OptionError("--host-headers: a host with a user or password; these belong in its Authorization header")
    match = _HOST.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        target = parse_url(f"{match['scheme'] or 'https'}://{match['host']}/")
    except (FetchError, ValueError):
        raise OptionError(f"--host-headers: found {text[:80]!r}, expected {expected}") from None
    return target.scheme, match["wildcard"] is not None, target.origin


def _parse_headers(host: str, table: Any) -> dict[str, str]:
    where = f'--host-headers: ["{host}"]'
    if not isinstance(table, dict):
        raise OptionError(f'--host-headers: {host!r} is not in a table; expected a line ["HOST"] above it')
    headers: dict[str, str] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            raise OptionError(f'{where}: expected the whole host in quotes, as in ["images.example.org"]')
        title = name.title()
        if not _NAME.fullmatch(name):
            start = re.split(r"[\s:]", name)[0][:80]  # what follows may be the value
            raise OptionError(f"{where}: a header's name that begins with {start!r} is not valid")
        if name.lower() in _OWN:
            raise OptionError(f"{where}: the header {name} is batchvl's own{_HINTS.get(name.lower(), '')}")
        if title in headers:
            raise OptionError(f"{where}: the header {name} is there twice")
        if not isinstance(value, str) or not _VALUE.fullmatch(value):
            raise OptionError(
                f"{where}: the value of {name} is not text in ASCII, without line breaks, and not empty or with spaces "
                "at its ends"
            )
        headers[title] = value
    return headers


_HINTS = {"user-agent": "; see --user-agent", "proxy-authorization": "; a proxy's user and password belong to --proxy"}
