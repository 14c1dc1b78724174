"""The object stores of this machine's environment, through obstore.

obstore (Rust's object_store) is asynchronous and makes one request per object. Beside pyarrow.fs, which blocks a thread
and makes two, it takes a third of the CPU time per image, a read can be interrupted, and errors have their status.
pyarrow's client for Azure even ends the process when it finds no credentials. obstore reads no `~/.aws`, and not every
kind of Google's credentials; for these it asks the store's own library, which is an extra.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs
from obstore.exceptions import BaseError, GenericError
from obstore.store import AzureStore, GCSStore, S3Store

from ..errors import ConnectionFailed, FetchError, HttpStatus, InvalidUrl, MissingFile
from .http import TransientError
from .object_urls import Container, parse_container

if TYPE_CHECKING:
    from obstore.store import (
        AzureConfig,
        ClientConfig,
        GCSConfig,
        GCSCredentialProvider,
        RetryConfig,
        S3Config,
        S3CredentialProvider,
    )

_KEEP_ALIVE_SECONDS = 10.0
_CREDENTIAL_SECONDS = timedelta(minutes=10)
"""For how long credentials of boto3 are used, which renews them 10 minutes before they expire."""
_NO_RETRIES: RetryConfig = {"max_retries": 0}
"""Retries are for the dispatcher, which slows down for the whole bucket."""
_READ_ONLY = "https://www.googleapis.com/auth/devstorage.read_only"

_AWS_VARIABLES = (
    "AWS_SKIP_SIGNATURE",
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_GOOGLE_VARIABLES = (
    "GOOGLE_SKIP_SIGNATURE",
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
_AZURE_CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
_AZURE_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT")
_AZURE_KEYS = ("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_MASTER_KEY", "AZURE_STORAGE_KEY")
_AZURE_TOKENS = ("AZURE_STORAGE_SAS_TOKEN", "AZURE_STORAGE_SAS_KEY")
_AZURE_ENDPOINTS = ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_AZURE_IDENTITIES = (
    "AZURE_SKIP_SIGNATURE",
    "AZURE_STORAGE_TOKEN",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_CLIENT_SECRET",
    "AZURE_USE_AZURE_CLI",
)


class ObjectStore(NamedTuple):
    """The objects of one bucket."""

    objects: AzureStore | GCSStore | S3Store
    credentials: str
    """Where the credentials come from, for messages."""


def open_store(scheme: str, bucket: str, connect_timeout: float) -> ObjectStore:
    """Return the store of a bucket. May block for a request.

    Args:
        scheme: One of the values of `object_urls.STORES`.
        bucket: The bucket's name.
        connect_timeout: Seconds.

    Raises:
        FetchError: The store cannot be read with what is in the environment.
        TransientError: Another attempt may help.
    """
    try:
        return _OPENERS[scheme](bucket, connect_timeout)
    except (BaseError, OSError, ValueError) as error:
        raise ConnectionFailed(f"the settings of the environment cannot be used: {_reason(error)}") from None


def _open_s3(bucket: str, connect_timeout: float) -> ObjectStore:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    config: S3Config = {} if endpoint else {"region": _region(bucket)}
    provider: S3CredentialProvider | None = None
    source = _first_set(*_AWS_VARIABLES)
    if source is None and (source := _aws_profile()):
        provider = _boto3_credentials(source)
    objects = S3Store(
        bucket,
        config=config,
        credential_provider=provider,
        client_options=_client_options(endpoint, connect_timeout),
        retry_config=_NO_RETRIES,
    )
    return ObjectStore(objects, source or "the machine's role")


def _region(bucket: str) -> str:
    try:
        return str(pa.fs.resolve_s3_region(bucket))
    except (OSError, pa.ArrowException) as error:
        if "not found" in str(error):
            raise MissingFile("there is no such bucket") from None
        failed = ConnectionFailed("the store did not say which region the bucket is in")
        raise TransientError(failed, blames_host=True) from None
    except (ImportError, AttributeError):
        raise ConnectionFailed("s3:// needs a pyarrow with support for it, as on PyPI") from None


def _aws_profile() -> str | None:
    """Return what names the profile of AWS's own tools, if there is one."""
    if source := _first_set("AWS_PROFILE", "AWS_DEFAULT_PROFILE"):
        return source
    files = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
    found = (os.environ.get(name, path) for name, path in files.items())
    return next((path for path in found if Path(path).expanduser().is_file()), None)


def _boto3_credentials(source: str) -> S3CredentialProvider:
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise _missing_extra("aws", source) from None
    from botocore.exceptions import BotoCoreError

    try:
        return Boto3CredentialProvider(boto3.Session(), ttl=_CREDENTIAL_SECONDS)
    except (BotoCoreError, ValueError) as error:
        raise ConnectionFailed(f"{source} has no credentials ({type(error).__name__})") from None


def _open_gs(bucket: str, connect_timeout: float) -> ObjectStore:
    emulator = os.environ.get("STORAGE_EMULATOR_HOST")
    options = _client_options(emulator or os.environ.get("GOOGLE_BASE_URL"), connect_timeout)
    make = partial(GCSStore, bucket, client_options=options, retry_config=_NO_RETRIES)
    if emulator:
        config: GCSConfig = {"base_url": _with_scheme(emulator), "skip_signature": True}
        return ObjectStore(make(config=config), "none, because of STORAGE_EMULATOR_HOST")
    source = _first_set(*_GOOGLE_VARIABLES) or "the application default credentials"
    try:
        return ObjectStore(make(), source)
    except GenericError as error:
        if "unknown variant" not in str(error) or source.startswith("GOOGLE_SERVICE_ACCOUNT"):
            raise  # google.auth does not know this variable
    return ObjectStore(make(credential_provider=_google_credentials(source)), source)


def _google_credentials(source: str) -> GCSCredentialProvider:
    try:
        import google.auth
        from obstore.auth.google import GoogleCredentialProvider
    except ImportError:
        raise _missing_extra("gcp", source) from None
    from google.auth.exceptions import GoogleAuthError

    try:
        credentials, _ = google.auth.default(scopes=[_READ_ONLY])
    except GoogleAuthError as error:
        raise ConnectionFailed(f"{source} cannot be used ({type(error).__name__})") from None
    return GoogleCredentialProvider(credentials)


def _open_abfs(bucket: str, connect_timeout: float) -> ObjectStore:
    container, settings = parse_container(bucket), _azure_settings()
    own = settings.account
    if not (account := container.account or own):
        note = "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH, or set AZURE_STORAGE_ACCOUNT_NAME"
        raise InvalidUrl(f"which account of Azure? {note}")
    if own not in (None, account) and settings.secret:
        raise HttpStatus(f"{settings.secret} is for the account {own!r} and cannot be used for {account!r}")
    endpoint = settings.endpoint if account == own and settings.endpoint else _azure_endpoint(account, container)
    config: AzureConfig = {**settings.config, "account_name": account, "endpoint": endpoint}
    objects = AzureStore(
        container.name,
        config=config,
        client_options=_client_options(endpoint, connect_timeout),
        retry_config=_NO_RETRIES,
    )
    source = settings.secret or _first_set(*_AZURE_IDENTITIES)
    return ObjectStore(objects, source or "the machine's managed identity")


class _AzureSettings(NamedTuple):
    """What the environment says about Azure, for one account or for all that an identity may read."""

    account: str | None
    endpoint: str | None
    secret: str | None
    """Variable with a secret of the account."""
    config: AzureConfig


def _azure_settings() -> _AzureSettings:
    secret = _first_set(_AZURE_CONNECTION, *_AZURE_KEYS, *_AZURE_TOKENS)
    if secret == _AZURE_CONNECTION:
        parts = dict(part.strip().partition("=")[::2] for part in os.environ[secret].split(";"))
        names = ("AccountName", "AccountKey", "SharedAccessSignature", "BlobEndpoint", "EndpointSuffix")
        account, key, token, endpoint, suffix = map(parts.get, names)
        if endpoint and not account:  # as the portal writes it for a SAS token
            account = (urlsplit(endpoint).hostname or "").partition(".")[0]
        elif account and suffix and not endpoint:
            endpoint = f"https://{account}.blob.{suffix}"
    else:
        account, key, token, endpoint = map(_value, (_AZURE_ACCOUNTS, _AZURE_KEYS, _AZURE_TOKENS, _AZURE_ENDPOINTS))
    config: AzureConfig = {}
    if key:
        config = {"credential_type": "access_key", "account_key": key}
    elif token:
        config = {"credential_type": "sas_token", "sas_key": token.removeprefix("?")}
    return _AzureSettings(account or None, endpoint or None, secret, config)


def _azure_endpoint(account: str, container: Container) -> str:
    return f"https://{account}.blob.{container.cloud or 'core.windows.net'}"


_OPENERS: dict[str, Callable[[str, float], ObjectStore]] = {"s3": _open_s3, "gs": _open_gs, "abfs": _open_abfs}


def _client_options(endpoint: str | None, connect_timeout: float) -> ClientConfig:
    return {
        "allow_http": _with_scheme(endpoint or "https://").startswith("http://"),
        "connect_timeout": timedelta(seconds=connect_timeout),
        "timeout": timedelta(days=1),  # the caller has one
        "pool_idle_timeout": timedelta(seconds=_KEEP_ALIVE_SECONDS),
    }


def _missing_extra(extra: str, source: str) -> FetchError:
    return ConnectionFailed(f"reading the credentials of {source} needs pip install 'batchvl[{extra}]'")


def _reason(error: Exception) -> str:
    """Return what obstore says of a setting, without the detail that follows, which might quote a secret."""
    return str(error).partition("\n")[0].partition(" error: ")[2].partition(": ")[0] or type(error).__name__


def _first_set(*names: str) -> str | None:
    return next((name for name in names if os.environ.get(name)), None)


def _value(names: tuple[str, ...]) -> str | None:
    return os.environ.get(_first_set(*names) or "")


def _with_scheme(endpoint: str) -> str:
    """Return an endpoint as a URL; a bare authority is one of http."""
    return endpoint if "://" in endpoint else f"http://{endpoint}"
