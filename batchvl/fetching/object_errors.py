"""Classification of the failures of object stores: which `FetchError` each one is, and whether to try again.

obstore has types of its own for a few failures; the rest is in its texts. These repeat URLs and the bodies of
responses, so only names of errors, statuses and the reasons of connection failures are quoted. A key could say what the
store should have said: in texts that are searched for that, it is percent-encoded.
"""

from __future__ import annotations

import re

from obstore.exceptions import PermissionDeniedError, UnauthenticatedError

from ..errors import (
    ConnectionFailed,
    FetchError,
    FetchTimeout,
    HttpRetryable,
    HttpStatus,
    MissingFile,
    NameResolutionFailed,
)
from .http import GATEWAY_STATUSES, REJECTIONS, TRANSIENT_STATUSES, Rejected, TransientError

_STATUS = re.compile(r"Server returned non-2xx status code: (\d{3})")
_NAME = re.compile(r"<Code>([A-Za-z]{1,60})</Code>")
_TOKEN_REQUEST = re.compile(r"performing (?:PUT|POST) |performing GET http://169\.254\.|token request|token file")
"""A request for credentials, not for the object."""
_PROVIDER = re.compile(r"[^:]* for path External \w+ credential provider: (\w+)")
_REASON = re.compile(r'message: "([A-Za-z0-9 \'-]{4,60})')
"""Where the text quotes what the system said about a connection."""
_DETAILS = "\n\nDebug source:"


def classify_store(error: Exception, credentials: str) -> FetchError | TransientError:
    """Return what an exception of obstore means for an image.

    Args:
        error: The exception.
        credentials: Where the credentials come from.
    """
    text, _, details = str(error).partition(_DETAILS)
    match error:
        case FileNotFoundError():
            return _classify_status(404, "", credentials)
        case UnauthenticatedError() if match := _PROVIDER.match(text):
            return _no_credentials(credentials, match[1])
        case UnauthenticatedError() | PermissionDeniedError():
            status = 403 if isinstance(error, PermissionDeniedError) else 401
            return _classify_status(status, _name(text), credentials)
    if _TOKEN_REQUEST.search(text):
        return _no_credentials(credentials)
    if match := _STATUS.search(text):
        return _classify_status(int(match[1]), _name(text), credentials)
    if "without LOCATION" in text:
        return HttpStatus("the store redirects: the bucket is in another region, or at another endpoint")
    return _classify_connection(text, details)


def _name(text: str) -> str:
    """Return the name that the store gives an error, if it does."""
    return match[1] if (match := _NAME.search(text)) else ""


def _no_credentials(credentials: str, reason: str = "") -> TransientError:
    note = f" ({reason})" if reason else ""
    unable = ConnectionFailed(f"no credentials for the store were to be had{note}; from: {credentials}")
    return TransientError(unable, blames_host=True)


def _classify_status(status: int, name: str, credentials: str) -> FetchError | TransientError:
    """Return what a status means."""
    found = f"{name} (status {status})" if name else f"status {status}"
    if status == 404:
        return MissingFile("there is no such object, or no such bucket")
    if status in (401, 403):
        note = f"the store denied access: {found}; credentials: {credentials}"
        return HttpStatus(f"{note}. Without permission to list, this may also be a missing object")
    if status in REJECTIONS:
        return Rejected(HttpRetryable(f"the store asks for fewer requests: {found}"), 0.0)
    if status in TRANSIENT_STATUSES or status >= 500:
        return TransientError(HttpRetryable(f"the store failed: {found}"), blames_host=status in GATEWAY_STATUSES)
    return HttpStatus(f"the store refused the request: {found}")


def _classify_connection(text: str, details: str) -> FetchError | TransientError:
    """Return what a failure without a response, or within one, means."""
    if "InvalidCertificate" in details:
        return ConnectionFailed("the store's certificate is not trusted")
    if '"dns error"' in details:
        unresolved = NameResolutionFailed("the name of the store's endpoint does not resolve")
        return TransientError(unresolved, blames_host=True)
    if "response body error" in text:
        return TransientError(ConnectionFailed("the connection to the store broke while the object was sent"))
    if "error sending request" not in text or "Parse(" in details:
        return TransientError(ConnectionFailed("the response is not one of such a store"))
    if "TimedOut" in details:
        return TransientError(FetchTimeout("no connection to the store in time"), blames_host=True)
    reason = match[1] if (match := _REASON.search(details)) else "it broke before the response"
    return TransientError(ConnectionFailed(f"the connection to the store failed: {reason}"), blames_host=True)
