"""How fetching from the web fails: which `FetchError` each failure is, and whether to try again. Decided once, here."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

import aiohttp

from ..errors import (
    ConnectionFailed,
    FetchError,
    FetchTimeout,
    ForbiddenAddress,
    HttpRetryable,
    HttpStatus,
    InvalidUrl,
    NameResolutionFailed,
    TooManyRedirects,
    UnsupportedSource,
)
from ..types import WebImage
from .labels import source_label
from .network import AddressRefused

MAX_REDIRECTS = 5
_PASSING_STATUS = {408, 425, 429}  # and 5xx
_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}


class TransientError(Exception):
    """A failure that may pass: the error that it becomes if it does not, and the seconds that the server asks for."""

    def __init__(self, error: FetchError, after: float = 0) -> None:
        super().__init__(str(error))
        self.error, self.after = error, after


def check_scheme(image: WebImage) -> None:
    """Raises UnsupportedSource unless the URL is one of http or https."""
    scheme, colon, _ = image.url.lstrip().partition(":")
    if scheme.lower() not in ("http", "https"):
        found = f"scheme {scheme[:16]!r}" if colon else "no scheme"
        raise UnsupportedSource(f"{source_label(image)}: found {found}, want http or https")


def check_status(status: int, headers: Mapping[str, str], label: str) -> None:
    """Raises HttpStatus, or Passing, for an answer that holds no picture."""
    if 200 <= status < 300:
        return
    if status not in _PASSING_STATUS and status < 500:
        raise HttpStatus(f"{label}: HTTP status {status}")
    text = headers.get("Retry-After", "")
    after = retry_after(text)
    asks = f"; it asks to come again in {after:,.0f} s" if after else ""
    raise TransientError(HttpRetryable(f"{label}: HTTP status {status}{asks}"), after)


def retry_after(text: str) -> float:
    """Seconds from now that a Retry-After header asks for, as a number or as a date (RFC 9110, 10.2.3).

    >>> retry_after("120"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), retry_after("soon")
    (120.0, 0.0, 0.0)
    """
    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def failure(error: Exception, label: str) -> FetchError | TransientError:
    """What an exception of aiohttp, or of the URL's parsing, means for the picture.

    Only chosen parts of an exception's text are told: much of it repeats the URL with its secrets.
    """
    match error:
        case aiohttp.ClientConnectorError(os_error=AddressRefused() as refused):
            return ForbiddenAddress(f"{label}: {refused}; --allow-private opens networks")
        case aiohttp.ClientConnectorCertificateError():
            return ConnectionFailed(f"{label}: the server's certificate is not trusted: {_reason(error.os_error)}")
        case aiohttp.ClientConnectorDNSError():
            unresolved = NameResolutionFailed(f"{label}: {error.host}: {_reason(error.os_error)}")
            return unresolved if error.os_error.errno in _NO_SUCH_NAME else TransientError(unresolved)
        case TimeoutError():
            return TransientError(FetchTimeout(f"{label}: the server fell silent"))
        case aiohttp.NonHttpUrlClientError():
            return UnsupportedSource(f"{label}: redirects to something that is neither http nor https")
        case aiohttp.InvalidUrlRedirectClientError():
            return InvalidUrl(f"{label}: redirects to something that is no URL")
        case aiohttp.TooManyRedirects():
            return TooManyRedirects(f"{label}: more than {MAX_REDIRECTS} redirects")
        case aiohttp.ClientConnectorError():
            return TransientError(ConnectionFailed(f"{label}: cannot connect: {_reason(error.os_error)}"))
        case aiohttp.ClientResponseError():
            said = " ".join(error.message.split())
            return TransientError(ConnectionFailed(f"{label}: the server does not speak HTTP: {said}"))
        case aiohttp.ClientPayloadError():
            return TransientError(ConnectionFailed(f"{label}: the body broke off or is garbled"))
        case OSError():
            return TransientError(ConnectionFailed(f"{label}: the connection broke: {_reason(error)}"))
        case ValueError():
            return InvalidUrl(f"{label}: is no URL that can be fetched")
        case _:
            return TransientError(ConnectionFailed(f"{label}: the connection broke ({type(error).__name__})"))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
