"""Where the credentials for buckets come from, as far as obstore does not find them itself."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from batchvl.errors import ConnectionFailed, HttpStatus

from ..faults.clouds import Clouds
from ..faults.store import ObjectStore
from .objects import error_of, fetch_one, fetching

PROFILES = """
[default]
aws_access_key_id = DEFAULT
aws_secret_access_key = secret

[night]
aws_access_key_id = NIGHT
aws_secret_access_key = secret
"""
ISSUED = {"Version": 1, "AccessKeyId": "ISSUED", "SecretAccessKey": "secret", "SessionToken": "token"}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    """A store whose credentials are in `~/.aws`, and not in the environment."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws/credentials").write_text(PROFILES)
    with ObjectStore() as store:
        store.put("cat", b"cat")
        for name, value in store.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        yield store


async def signer(store: ObjectStore) -> str:
    """Return the access key with which an object was read."""
    store.requests.clear()
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, "s3://night/cat") == b"cat"
    return store.requests[0].key_id


async def test_profiles_of_aws(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert await signer(store) == "DEFAULT"
    monkeypatch.setenv("AWS_PROFILE", "night")
    assert await signer(store) == "NIGHT"
    issue = f'{sys.executable} -c "import json; print(json.dumps({ISSUED}))"'
    (tmp_path / ".aws/config").write_text(f"[profile issued]\ncredential_process = {issue}\n")
    monkeypatch.setenv("AWS_PROFILE", "issued")
    assert await signer(store) == "ISSUED"
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "VARIABLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert await signer(store) == "VARIABLE", "as with AWS's own tools"


async def test_no_signature(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    error = await error_of("s3://night/cat")
    assert "denied access: status 403; credentials: AWS_SKIP_SIGNATURE" in str(error), "the object is not public"
    assert [request.key_id for request in store.requests] == [""]


async def test_a_profile_that_is_not_there(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "day")
    error = await error_of("s3://night/cat")
    assert (type(error), str(error)) == (
        ConnectionFailed,
        "s3://night/cat: AWS_PROFILE has no credentials (ProfileNotFound)",
    )


async def test_a_profile_without_boto3(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    error = await error_of("s3://night/cat")
    assert type(error) is ConnectionFailed
    assert str(error).endswith("reading the credentials of ~/.aws/credentials needs pip install 'batchvl[aws]'")
    assert store.requests == []


async def test_a_role_that_is_not_there(store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".aws/credentials").unlink()
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    error = await error_of("s3://night/cat", fetch_retries=0, host_patience=0.1)
    assert type(error) is ConnectionFailed
    assert "no credentials for the store were to be had; from: the machine's role" in str(error)
    assert store.requests == []


class TokenServer:
    """Exchanges tokens as Google's security token service does. A context manager."""

    def __enter__(self) -> TokenServer:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                body = json.dumps({"access_token": "exchanged", "expires_in": 3600, "token_type": "Bearer"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/token"
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def federated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Clouds]:
    """Google's store, with the credentials of a workload identity federation."""
    (tmp_path / "subject").write_text("subject's token")
    with TokenServer() as tokens, Clouds() as clouds:
        credentials = {
            "type": "external_account",
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/p",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": tokens.url,
            "credential_source": {"file": str(tmp_path / "subject")},
        }
        (tmp_path / "google.json").write_text(json.dumps(credentials))
        monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "google.json"))
        monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
        monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
        monkeypatch.setenv("GOOGLE_BASE_URL", clouds.url)
        clouds.objects["cat"] = b"cat"
        yield clouds


async def test_federated_credentials_of_google(federated: Clouds) -> None:
    async with fetching() as (fetcher, arena):
        assert await fetch_one(fetcher, arena, "gs://night/cat") == b"cat"
    assert federated.requests[0].headers["authorization"] == "Bearer exchanged"
    federated.fault = lambda _: 403
    error = await error_of("gs://night/cat")
    assert type(error) is HttpStatus
    assert "credentials: GOOGLE_APPLICATION_CREDENTIALS" in str(error)


async def test_federated_credentials_without_google_auth(federated: Clouds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "google.auth", None)
    error = await error_of("gs://night/cat")
    assert str(error).endswith("credentials of GOOGLE_APPLICATION_CREDENTIALS needs pip install 'batchvl[gcp]'")
