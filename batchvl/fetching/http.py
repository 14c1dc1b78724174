"""Classification of HTTP failures: which `FetchError` each one is, whose fault it is, and whether to try again.

The errors made here have texts without the image's name, which the fetcher puts in front. They quote only chosen parts
of an exception: much of its text repeats the URL with its secrets, or bytes of the response.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

from multidict import CIMultiDictProxy

from ..errors import (
    ConnectionFailed,
    FetchError,
    FetchTimeout,
    ForbiddenAddress,
    HttpRetryable,
    HttpStatus,
    InvalidUrl,
    NameResolutionFailed,
)
from .http1.errors import ConnectTimeout, DnsError, HttpError, IncompleteBody, ProtocolError, ProxyRefused, TlsError
from .network import AddressRefused
from .opt_out import opt_out_of
from .resolver import NO_SUCH_NAME

REDIRECTS = {300, 301, 302, 303, 307, 308}
REJECTIONS = {429, 503}
"""Statuses that ask for fewer requests."""
TRANSIENT_STATUSES = {408, 425}
"""Statuses after which another attempt may help, besides 5xx."""
GATEWAY_STATUSES = {502, 504}
"""Statuses that blame the host: other requests would probably fail too."""


class TransientError(Exception):
    """A failure that another attempt may not have.

    Args:
        error: The row's error if no attempt succeeds.
        blames_host: Whether other requests to the host would probably fail too.
    """

    def __init__(self, error: FetchError, *, blames_host: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.blames_host = error, blames_host


class Rejected(TransientError):
    """The host asks for fewer requests.

    Args:
        error: The row's error if no attempt succeeds.
        retry_after: Seconds that the host asks to wait; 0 if it does not say.
    """

    def __init__(self, error: FetchError, retry_after: float) -> None:
        super().__init__(error)
        self.retry_after = retry_after


def check_status(status: int, headers: Mapping[str, str]) -> None:
    """Raise HttpStatus, TransientError or Rejected unless the status means success."""
    if 200 <= status < 300:
        return
    text = f"HTTP status {status}"
    if status in REJECTIONS:
        seconds = parse_retry_after(headers.get("Retry-After", ""))
        note = f"; the server asks to retry after {seconds:,.0f} s" if seconds else ""
        raise Rejected(HttpRetryable(text + note), seconds)
    if status in TRANSIENT_STATUSES or status >= 500:
        raise TransientError(HttpRetryable(text), blames_host=status in GATEWAY_STATUSES)
    raise HttpStatus(text)


def may_be_kept(headers: CIMultiDictProxy[str]) -> bool:
    """Return whether the image of a response may be used again by later runs, which do not see its headers."""
    directives = ",".join(headers.getall("Cache-Control", ())).lower().split(",")
    return "no-store" not in map(str.strip, directives) and opt_out_of(headers.items()) is None


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


def classify(error: HttpError | AddressRefused | ValueError) -> FetchError | TransientError:
    """Return what an exception of the HTTP client means for an image."""
    match error:
        case AddressRefused():
            return ForbiddenAddress(f"{error}; allow its network with --allow-private, or its host with --allow-host")
        case DnsError(os_error=os_error):
            unresolved = NameResolutionFailed(str(error))
            return unresolved if os_error.errno in NO_SUCH_NAME else TransientError(unresolved, blames_host=True)
        case ConnectTimeout():
            return TransientError(FetchTimeout(str(error)), blames_host=True)
        case TlsError(is_certificate=True):
            return ConnectionFailed(f"the server's certificate is not trusted: {error.reason}")
        case ProxyRefused() if error.status < 500:
            return ConnectionFailed(str(error))
        case ProtocolError():
            return TransientError(ConnectionFailed(f"the server's response is not valid HTTP: {error}"))
        case IncompleteBody():
            return TransientError(ConnectionFailed(str(error)))
        case HttpError():
            return TransientError(ConnectionFailed(str(error)), blames_host=True)
        case ValueError():
            return InvalidUrl("not a valid URL")
