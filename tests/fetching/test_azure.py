"""Images in containers of Azure, with Azurite on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from batchvl.errors import ConnectionFailed, ForbiddenAddress, HttpStatus, InvalidUrl, MissingFile, TooManyBytes
from batchvl.fetching.object_stores import open_store

from ..faults.azurite import ACCOUNT, KEY, Azurite
from .objects import error_of, fetch_one, fetching

BLOB = "2024/we?ird #k%2fy ü.png"
LARGE = bytes(range(256)) * 20_000
OWN = f"{ACCOUNT}.dfs.core.windows.net"
ALLOWED = [
    "abfs://night",
    f"abfs://night@{OWN}",
    "abfs://day",
    "abfs://other",
    "abfs://night@another1.dfs.core.windows.net",
]
VARIABLES = ("ACCOUNT_NAME", "ACCOUNT", "ACCOUNT_KEY", "KEY", "SAS_TOKEN", "ENDPOINT", "CONNECTION_STRING")


@pytest.fixture(scope="module")
def azurite() -> Iterator[Azurite]:
    with Azurite() as azurite:
        azurite.put(f"night/{BLOB}", b"odd name")
        azurite.put("night/large", LARGE)
        azurite.put("day/public", b"public")
        yield azurite


@pytest.fixture(autouse=True)
def account(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the environment name the account and its key, and nothing else of Azure."""
    for name in VARIABLES:
        monkeypatch.delenv(f"AZURE_STORAGE_{name}", raising=False)
    for name, value in azurite.environment().items():
        monkeypatch.setenv(name, value)


async def read(url: str, **options: object) -> bytes:
    async with fetching(allow_bucket=ALLOWED, **options) as (fetcher, arena):
        return await fetch_one(fetcher, arena, url)


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "az", "ABFS"])
@pytest.mark.parametrize("container", ["night", f"night@{OWN}", f"night@{ACCOUNT}.blob.core.windows.net"])
async def test_a_blob_in_every_spelling(scheme: str, container: str) -> None:
    assert await read(f"{scheme}://{container}/{BLOB}") == b"odd name"


async def test_a_large_blob() -> None:
    assert await read("az://night/large") == LARGE
    assert type(await error_of("az://night/large", allow_bucket=ALLOWED, max_image_bytes=1000)) is TooManyBytes


async def test_a_sas_token(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    for token in (azurite.sas_token(), "?" + azurite.sas_token()):
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", token)
        assert await read(f"az://night/{BLOB}") == b"odd name"
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", azurite.sas_token().replace("sig=", "sig=secret"))
    error = await error_of(f"az://night/{BLOB}", allow_bucket=ALLOWED)
    assert type(error) is HttpStatus
    assert "credentials: AZURE_STORAGE_SAS_TOKEN" in str(error)
    assert "sig" not in str(error)


async def test_a_connection_string(azurite: Azurite, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in azurite.environment():
        monkeypatch.setenv(name, "bm90aGluZw==")  # the connection string precedes all others
    common = f"DefaultEndpointsProtocol=http;AccountName={ACCOUNT};BlobEndpoint={azurite.url};"
    for secret in (f"AccountKey={KEY}", f"SharedAccessSignature={azurite.sas_token()}"):
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", common + secret)
        assert await read(f"az://night@{OWN}/{BLOB}") == b"odd name"


async def test_the_variables_of_azure_cli(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT", ACCOUNT)
    monkeypatch.setenv("AZURE_STORAGE_KEY", KEY)
    assert await read(f"az://night/{BLOB}") == b"odd name"


async def test_a_public_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_SKIP_SIGNATURE", "true")
    assert await read("az://day/public") == b"public"
    error = await error_of(f"az://night/{BLOB}", allow_bucket=ALLOWED)
    assert "credentials: AZURE_SKIP_SIGNATURE" in str(error)


@pytest.mark.parametrize("url", ["az://night/missing", "az://other/missing"])
async def test_what_is_missing(url: str) -> None:
    assert type(await error_of(url, allow_bucket=ALLOWED)) is MissingFile


async def test_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    error = await error_of(f"az://night/{BLOB}", allow_bucket=ALLOWED)
    assert type(error) is HttpStatus
    assert "AuthorizationFailure (status 403); credentials: AZURE_STORAGE_ACCOUNT_KEY" in str(error)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "not the secret")
    error = await error_of(f"az://night/{BLOB}", allow_bucket=ALLOWED)
    assert type(error) is ConnectionFailed
    assert str(error).endswith("the settings of the environment cannot be used: Invalid Access Key")


async def test_no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME")
    error = await error_of("az://night/cat", allow_bucket=ALLOWED)
    assert type(error) is InvalidUrl
    assert "set AZURE_STORAGE_ACCOUNT_NAME" in str(error)


async def test_a_key_is_not_used_for_another_account() -> None:
    url = "abfs://night@another1.dfs.core.windows.net/cat"
    error = await error_of(url, allow_bucket=ALLOWED)
    assert str(error) == (
        f"{url}: AZURE_STORAGE_ACCOUNT_KEY is for the account '{ACCOUNT}' and cannot be used for 'another1'"
    )


async def test_an_account_that_is_not_allowed() -> None:
    url = "abfs://night@another1.dfs.core.windows.net/cat"
    error = await error_of(url, allow_bucket=["abfs://*", f"abfs://*@{OWN}"])
    assert type(error) is ForbiddenAddress
    assert str(error).endswith("allow it with --allow-bucket abfs://night@another1.dfs.core.windows.net")


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("AccountName=me2;AccountKey=c2VjcmV0;EndpointSuffix=core.windows.net", "https://me2.blob.core.windows.net"),
        ("AccountName=me2;AccountKey=c2VjcmV0", "https://me2.blob.core.windows.net"),
        ("AccountName=me2;EndpointSuffix=core.chinacloudapi.cn", "https://me2.blob.core.chinacloudapi.cn"),
        (
            "BlobEndpoint=https://me2.blob.core.windows.net;SharedAccessSignature=sig=a",
            "https://me2.blob.core.windows.net",
        ),
    ],
)
def test_which_account_a_connection_string_is_for(monkeypatch: pytest.MonkeyPatch, text: str, endpoint: str) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    config = open_store("abfs", "photos", 1).objects.config
    assert (config["account_name"], config["endpoint"]) == ("me2", endpoint)


def test_an_endpoint_is_not_used_for_another_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    config = open_store("abfs", "night@me2.dfs.core.usgovcloudapi.net", 1).objects.config
    assert (config["account_name"], config["endpoint"]) == ("me2", "https://me2.blob.core.usgovcloudapi.net")
