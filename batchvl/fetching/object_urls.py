"""URLs of objects in buckets, and which buckets a manifest may have read.

A manifest is text from anywhere, and buckets are read with the operator's credentials: a row could name a private
bucket that the operator has access to. So only buckets of `--allow-bucket` are read. A bucket of Azure is a container,
and where its URL names an account, that is a part of the bucket's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import NamedTuple

from ..errors import ForbiddenAddress, InvalidUrl, OptionError
from .urls import Target

STORES = {"s3": "s3", "gs": "gs", "gcs": "gs", "abfs": "abfs", "abfss": "abfs", "az": "abfs"}
"""Schemes of object stores, and the spelling that stands for all that mean the same."""

_MAX_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTAINER = re.compile(
    r"(?P<container>\$root|\$web|[a-z0-9][a-z0-9-]{2,62})"
    r"(?:@(?P<account>[a-z0-9]{3,24})\.(?:dfs|blob)\."
    r"(?P<cloud>core\.windows\.net|core\.chinacloudapi\.cn|core\.usgovcloudapi\.net))?"
)
_SAS = re.compile(r"\?(?:[^?]*&)?sig=")
_CONTROLS = re.compile(r"[\0-\x1f\x7f]")
_PATTERN = re.compile(r"(s3|gs|gcs|abfss?|az)://[^/]+/?|hf://.+")
UNREADABLE = {"", ".", ".."}
"""Segments of a key for which clients request another object, even one of another bucket."""


def parse_object_url(text: str) -> Target:
    """Parse the URL of an object. The key is what follows the bucket, as written: "?", "#" and "%" are part of it.

    >>> target = parse_object_url("gcs://photos/2024/50%25 off?.jpg")
    >>> target.origin, target.target
    ('gs://photos', '/2024/50%25 off?.jpg')

    Returns:
        A target whose `origin` is the bucket's URL, whose `host` is the bucket's name, and whose `target` is a slash
        and the key. There is no `url` for it.

    Raises:
        InvalidUrl: There is no bucket or no key, or one that cannot be requested.
    """
    scheme, _, rest = text.partition("://")
    store = STORES[scheme.lower()]
    bucket, _, key = rest.partition("/")
    if store == "abfs":
        bucket = str(parse_container(bucket))
        if _SAS.search(key):
            raise InvalidUrl("a SAS token in the URL is not used; set AZURE_STORAGE_SAS_TOKEN, or use the https URL")
    elif "@" in bucket:
        raise InvalidUrl("credentials in the URL are not used; set them in the environment")
    elif not _BUCKET.fullmatch(bucket):
        raise InvalidUrl(f"expected {scheme}://BUCKET/KEY")
    if not key:
        raise InvalidUrl("the URL names a bucket and no object")
    if not UNREADABLE.isdisjoint(key.split("/")):
        raise InvalidUrl("a key with an empty segment, or with '.' or '..' as one, cannot be requested")
    try:
        is_too_long = len(key.encode()) > _MAX_KEY_BYTES
    except UnicodeEncodeError:
        raise InvalidUrl("the key is not valid Unicode") from None
    if is_too_long or _CONTROLS.search(key):
        raise InvalidUrl(f"the key has more than {_MAX_KEY_BYTES:,} bytes, or a control character")
    origin = f"{store}://{bucket}"
    return Target(bucket, store, bucket, 0, f"/{key}", f"{origin}/{key}", origin, None)


class Container(NamedTuple):
    """A container of Azure Blob Storage."""

    name: str
    account: str | None
    """None for the account of the environment."""
    cloud: str | None
    """Domain of the account's cloud, such as "core.windows.net"; None without an account."""

    def __str__(self) -> str:
        return self.name if self.account is None else f"{self.name}@{self.account}.dfs.{self.cloud}"


def parse_container(text: str) -> Container:
    """Parse CONTAINER or CONTAINER@ACCOUNT.dfs.core.windows.net. An account's blob endpoint means the same.

    >>> str(parse_container("photos@me2.blob.core.windows.net"))
    'photos@me2.dfs.core.windows.net'

    Raises:
        InvalidUrl: It is anything else.
    """
    if match := _CONTAINER.fullmatch(text):
        return Container(match["container"], match["account"], match["cloud"])
    raise InvalidUrl("expected abfs://CONTAINER/PATH or abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH")


class BucketGuard:
    """Allows the buckets, and the repositories of the Hugging Face Hub, of `--allow-bucket`.

    Args:
        patterns: URLs of buckets, in which `*`, `?` and `[…]` have the meaning that they have in a shell. They match
            no "@": an account of Azure is allowed only by a pattern that has one.

    Raises:
        OptionError: One of these is not valid.

    >>> guard = BucketGuard(["s3://my-*"])
    >>> guard.allows("s3://my-photos"), guard.allows("gs://my-photos")
    (True, False)
    """

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._patterns = [_parse_pattern(text) for text in patterns]

    def allows(self, origin: str) -> bool:
        """Return whether a bucket may be read with the operator's credentials.

        Args:
            origin: URL of the bucket, as in `Target.origin`.
        """
        parts = origin.split("@")
        return any(len(pattern) == len(parts) and all(map(fnmatchcase, parts, pattern)) for pattern in self._patterns)

    def check(self, origin: str) -> None:
        """Raise ForbiddenAddress unless a bucket may be read."""
        if not self.allows(origin):
            raise ForbiddenAddress(f"reading the bucket is not allowed; allow it with --allow-bucket {origin}")


def _parse_pattern(text: str) -> list[str]:
    """Return the parts of a pattern, which "@" separates."""
    scheme, slashes, rest = text.strip().partition("://")
    pattern = scheme.lower() + slashes + rest
    if not _PATTERN.fullmatch(pattern):
        raise OptionError(f"--allow-bucket: expected a bucket such as s3://photos or s3://my-*; found {text!r}")
    store, rest = STORES.get(scheme.lower(), "hf"), rest.rstrip("/")
    if store != "abfs":
        return [f"{store}://{rest}"]  # a revision of a repository has an "@" as well, which is nothing else
    container, *account = rest.split("@", 1)
    return [f"abfs://{container}", *(host.replace(".blob.", ".dfs.") for host in account)]
