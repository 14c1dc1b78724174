"""Why a request of the HTTP client got no response, or not the whole of it.

All are kinds of `HttpError`, apart from `network.AddressRefused`, and ValueError for a host or a header that cannot be.
No text has a byte of a response, or anything of a URL but the name of its host.
"""

from __future__ import annotations

import os
import socket
import ssl


class HttpError(Exception):
    """A request got no response, or not the whole of it. The text has no byte of the response."""


class ProtocolError(HttpError):
    """The response is not valid HTTP."""


class Disconnected(HttpError):
    """The connection ended before the header of a response.

    Args:
        error: What broke it, if it did not end in an orderly manner.
        has_begun: Whether some of the response had arrived.
    """

    def __init__(self, error: OSError | None, *, has_begun: bool) -> None:
        super().__init__("the server closed the connection without a response")
        self.os_error, self.has_begun = error, has_begun


class IncompleteBody(HttpError):
    """The connection ended before the body did.

    Args:
        error: What broke it, if it did not end in an orderly manner.
    """

    def __init__(self, error: OSError | None) -> None:
        super().__init__("the body is incomplete")
        self.os_error = error


class ConnectError(HttpError):
    """The host does not accept a connection, or breaks it before the request.

    Args:
        error: Why; without a number if addresses failed for different reasons.
    """

    def __init__(self, error: OSError) -> None:
        if error.errno:
            reason = os.strerror(error.errno)
        else:
            reason = "no address accepts it" if type(error) is OSError else type(error).__name__
        super().__init__(f"cannot connect: {reason}")
        self.os_error = error


class ConnectTimeout(HttpError):
    """The host did not answer in time.

    Args:
        stage: What it did not answer to: "TCP" or "TLS".
    """

    def __init__(self, stage: str) -> None:
        super().__init__(f"cannot connect: no answer from the host ({stage})")
        self.stage = stage


class DnsError(HttpError):
    """The name of the host has no address.

    Args:
        host: The name.
        error: Why.
    """

    def __init__(self, host: str, error: socket.gaierror) -> None:
        super().__init__(f"{host}: {error.strerror or 'no address'}")
        self.host, self.os_error = host, error


class TlsError(HttpError):
    """The TLS handshake failed.

    Args:
        error: Why.
    """

    def __init__(self, error: ssl.SSLError) -> None:
        self.is_certificate = isinstance(error, ssl.SSLCertVerificationError)
        """Whether the server's certificate is to blame."""
        self.reason = str(getattr(error, "verify_message", "") or error.reason or type(error).__name__)
        super().__init__(f"TLS: {self.reason}")
        self.ssl_error = error


class ProxyRefused(HttpError):
    """The proxy does not connect to this host.

    Args:
        status: Its answer.
    """

    def __init__(self, status: int) -> None:
        super().__init__(f"the proxy answered with HTTP status {status}")
        self.status = status


class ProxyError(HttpError):
    """The proxy cannot be used, whatever the host.

    Args:
        proxy: The proxy, without user and password.
        reason: Why not.
    """

    def __init__(self, proxy: str, reason: str) -> None:
        super().__init__(f"the proxy {proxy} {reason}")
        self.proxy, self.reason = proxy, reason
