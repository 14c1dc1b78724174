"""An object store on loopback that fails on request: moto's S3 behind a real HTTP server."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote, unquote
from urllib.request import Request, urlopen

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

BUCKET = "night"
STATUS = {
    "denied": (403, "AccessDenied"),
    "busy": (503, "SlowDown"),
    "failed": (500, "InternalError"),
    "missing": (404, "NoSuchKey"),
}


class StoreRequest(NamedTuple):
    """A request to the store."""

    method: str
    path: str
    """With the query."""
    range: str
    """The Range header."""
    key_id: str
    """The access key that signed it, or nothing."""

    @property
    def uploads(self) -> bool:
        """Whether it uploads an object or a piece of one."""
        return self.method in ("PUT", "POST")


class ObjectStore:
    """The store, a context manager.

    `fault` decides the fate of a request: a key of STATUS, "drop" (the connection is closed), "hang" (as "drop", but
    not before the store is closed), or None (it is served).
    """

    def __init__(self) -> None:
        self.fault: Callable[[StoreRequest], str | None] = lambda request: None
        self.delay = 0.0
        """Seconds before each response."""
        self.requests: list[StoreRequest] = []
        self.open = self.max_open = 0
        """Requests in progress, and the largest number so far."""
        self._closing, self._lock = threading.Event(), threading.Lock()

    def __enter__(self) -> ObjectStore:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._serve = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._send("POST", "/moto-api/reset")
        self._send("PUT", f"/{BUCKET}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, state: Path | None = None) -> dict[str, str]:
        """Return the environment variables by which a process finds the store, and its working directories `state`."""
        variables = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        return variables | ({"BATCHVL_WORK": str(state)} if state else {})

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the objects with a prefix, which is cut off, less the directory markers of pyarrow."""
        listing = self._send("GET", f"/{BUCKET}?list-type=2&prefix={quote(prefix)}").decode()
        return [unquote(key)[len(prefix) :] for key in re.findall(r"<Key>([^<]*[^/<])</Key>", listing)]

    def read(self, key: str) -> bytes:
        return self._send("GET", f"/{BUCKET}/{quote(key)}")

    def put(self, key: str, data: bytes) -> None:
        self._send("PUT", f"/{BUCKET}/{quote(key)}", data)

    def delete(self, key: str) -> None:
        self._send("DELETE", f"/{BUCKET}/{quote(key)}")

    def clear(self) -> None:
        for key in self.names():
            self.delete(key)

    def _send(self, method: str, path: str, data: bytes | None = None) -> bytes:
        request = Request(
            self.url + path,
            data,
            {"X-By": "the test itself", "Content-Type": "application/octet-stream"},
            method=method,
        )
        with urlopen(request, timeout=30) as response:
            return bytes(response.read())

    def _handle(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        if environ.get("HTTP_X_BY"):
            return self._serve(environ, start)
        query = environ["QUERY_STRING"]
        path = environ["PATH_INFO"] + (f"?{query}" if query else "")
        signed = re.search("Credential=([^/]+)/", environ.get("HTTP_AUTHORIZATION", ""))
        key_id = signed[1] if signed else ""
        request = StoreRequest(environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", ""), key_id)
        with self._lock:
            self.requests.append(request)
            self.open += 1
            self.max_open = max(self.max_open, self.open)
        try:
            if self.delay:
                time.sleep(self.delay)
            fault = self.fault(request)
            if fault is None:
                return self._serve(environ, start)
            if fault in STATUS:
                status, code = STATUS[fault]
                start(f"{status} {code}", [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>on request</Message></Error>".encode()]
            if fault == "hang":
                self._closing.wait()
            environ["werkzeug.socket"].close()
            return []
        finally:
            with self._lock:
                self.open -= 1
