"""Classification of HTTP failures: which `FetchError` each one is, and whether another attempt may help."""

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
from .network import AddressRefused

MAX_REDIRECTS = 5
_TRANSIENT_STATUSES = {408, 425, 429}  # and 5xx
_NO_SUCH_NAME = {socket.EAI_NONAME, socket.EAI_NODATA}


class TransientError(Exception):
    """A failure that another attempt may not have.

    Args:
        error: The row's error if no attempt succeeds.
        retry_after: Seconds that the server asks to wait.
    """

    def __init__(self, error: FetchError, retry_after: float = 0) -> None:
        super().__init__(str(error))
        self.error, self.retry_after = error, retry_after


def check_status(status: int, headers: Mapping[str, str], label: str) -> None:
    """Raise HttpStatus or TransientError unless the status means success."""
    if 200 <= status < 300:
        return
    if status not in _TRANSIENT_STATUSES and status < 500:
        raise HttpStatus(f"{label}: HTTP status {status}")
    seconds = parse_retry_after(headers.get("Retry-After", ""))
    retry_after = f"; the server asks to retry after {seconds:,.0f} s" if seconds else ""
    raise TransientError(HttpRetryable(f"{label}: HTTP status {status}{retry_after}"), seconds)


def parse_retry_after(text: str) -> float:
    """Return the seconds from now in a Retry-After header, a number or a date (RFC 9110, section 10.2.3).

    >>> parse_retry_after("120"), parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), parse_retry_after("soon")
    (120.0, 0.0, 0.0)
    """
    text = text.strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def classify(error: Exception, label: str) -> FetchError | TransientError:
    """Return what an exception of aiohttp, or of parsing the URL, means for an image.

    Messages quote only chosen parts of the exception's text: much of it repeats the URL with its secrets.
    """
    match error:
        case aiohttp.ClientConnectorError(os_error=AddressRefused() as refused):
            return ForbiddenAddress(f"{label}: {refused}; allow its network with --allow-private")
        case aiohttp.ClientConnectorCertificateError():
            return ConnectionFailed(f"{label}: the server's certificate is not trusted: {_reason(error.os_error)}")
        case aiohttp.ClientConnectorDNSError():
            unresolved = NameResolutionFailed(f"{label}: {error.host}: {_reason(error.os_error)}")
            return unresolved if error.os_error.errno in _NO_SUCH_NAME else TransientError(unresolved)
        case TimeoutError():
            return TransientError(FetchTimeout(f"{label}: the server stopped responding"))
        case aiohttp.NonHttpUrlClientError():
            return UnsupportedSource(f"{label}: redirects to a URL that is neither http nor https")
        case aiohttp.InvalidUrlRedirectClientError():
            return InvalidUrl(f"{label}: redirects to an invalid URL")
        case aiohttp.TooManyRedirects():
            return TooManyRedirects(f"{label}: more than {MAX_REDIRECTS} redirects")
        case aiohttp.ClientConnectorError():
            return TransientError(ConnectionFailed(f"{label}: cannot connect: {_reason(error.os_error)}"))
        case aiohttp.ClientResponseError():
            cause = " ".join(error.message.split())
            return TransientError(ConnectionFailed(f"{label}: the server's response is not HTTP: {cause}"))
        case aiohttp.ClientPayloadError():
            return TransientError(ConnectionFailed(f"{label}: the body is incomplete or garbled"))
        case OSError():
            return TransientError(ConnectionFailed(f"{label}: the connection broke: {_reason(error)}"))
        case ValueError():
            return InvalidUrl(f"{label}: not a valid URL")
        case _:
            return TransientError(ConnectionFailed(f"{label}: the connection broke ({type(error).__name__})"))


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
