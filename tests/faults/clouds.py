"""An object store and a Hub on loopback that fail on request: as much of two protocols as reading an object takes.

- Google Cloud Storage's XML API, and Azure's: objects.
- The Hub's `resolve` URLs, with a redirect to another host for a large file.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit


class CloudRequest(NamedTuple):
    """A request to one of the services."""

    method: str
    path: str
    """As it was sent, with the query."""
    headers: dict[str, str]
    """By name in lower case."""


class Clouds:
    """The services, a context manager."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        """Contents by the path below the bucket `night`; on the Hub, by the whole path."""
        self.requests: list[CloudRequest] = []
        self.fault: Callable[[CloudRequest], int | None] = lambda request: None
        """Returns the status with which a request fails."""
        self.delay = 0.0
        """Seconds before each response."""
        self.cut: set[str] = set()
        """Objects of which only the first half is sent, before the connection is closed."""
        self.stalled: set[str] = set()
        """Objects of which only the first half is sent, while the connection stays open."""
        self.abandoned = threading.Event()
        """Set when a client closes the connection of a stalled object."""
        self.large: set[str] = set()
        """Paths that the Hub redirects to "localhost"."""
        self.open = self.max_open = 0
        """Requests in progress, and the largest number so far."""
        self._lock = threading.Lock()

    def __enter__(self) -> Clouds:
        clouds = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = CloudRequest(self.command, self.path, headers)
                with clouds._lock:
                    clouds.requests.append(request)
                    clouds.open += 1
                    clouds.max_open = max(clouds.max_open, clouds.open)
                time.sleep(clouds.delay)
                status, sent, body = clouds._respond(request)
                with clouds._lock:
                    clouds.open -= 1
                name = self.path.partition("?")[0].rpartition("/")[2]
                is_cut = name in clouds.cut | clouds.stalled
                self.send_response(status)
                for header, value in sent.items():
                    self.send_header(header, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):  # the client may have seen enough
                    self.wfile.write(body[: len(body) // 2] if is_cut else body)
                if name in clouds.stalled and not self.rfile.read(1):
                    clouds.abandoned.set()
                self.close_connection |= is_cut

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which a process finds the services."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "HF_ENDPOINT": self.url,
            "AZURE_STORAGE_ACCOUNT_NAME": "account",
            "AZURE_STORAGE_ACCOUNT_KEY": "bm90LWEtc2VjcmV0",
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/account",
        }

    def _respond(self, request: CloudRequest) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the response."""
        if (status := self.fault(request)) is not None:
            return status, {"Content-Type": "application/xml"}, b"<Error><Code>OnRequest</Code>body</Error>"
        path = urlsplit(request.path).path
        if match := re.fullmatch(r"(?:/account)?/night/(.+)", path):
            return self._object(unquote(match[1]))
        return self._hub(request, unquote(path))

    def _object(self, key: str) -> tuple[int, dict[str, str], bytes]:
        if key not in self.objects:
            return 404, {"Content-Type": "application/xml"}, b"<Error><Code>Missing</Code></Error>"
        return 200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT", "ETag": '"1"'}, self.objects[key]

    def _hub(self, request: CloudRequest, path: str) -> tuple[int, dict[str, str], bytes]:
        if path in self.large and "localhost" not in request.headers["host"]:
            return 302, {"Location": f"http://localhost:{self.port}{request.path}?signature=s"}, b""
        return (200, {}, self.objects[path]) if path in self.objects else (404, {}, b"not found")
