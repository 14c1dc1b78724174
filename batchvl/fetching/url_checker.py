"""Checks of URLs by their text alone, as far as that shows whether they can be fetched."""

from __future__ import annotations

from cachetools import LRUCache

from ..errors import FetchError
from ..types import WebImage
from .http import TransientError, classify
from .http1.connecting import check_host
from .image_client import UrlParser
from .network import AddressRefused, NetworkGuard
from .object_urls import STORES, BucketGuard
from .resolver import check_name, numeric_address
from .sources import named, source_label
from .urls import Target

_CACHE_SIZE = 65_536


class UrlChecker:
    """Finds URLs that a fetch would refuse by their text, without a lookup, a connection or a server.

    It asks what a fetch would ask, up to where a name would be looked up or a connection made, and so reports what the
    fetch would report.

    Args:
        guard: The addresses that are allowed.
        buckets: The buckets that are allowed.
        through_proxy: Whether there is a proxy.
    """

    def __init__(self, guard: NetworkGuard, buckets: BucketGuard | None = None, *, through_proxy: bool = False) -> None:
        self._guard, self._through_proxy = guard, through_proxy
        self._parser = UrlParser(BucketGuard() if buckets is None else buckets)
        self._refusals: LRUCache[str, FetchError | None] = LRUCache(_CACHE_SIZE)

    def parse(self, image: WebImage) -> Target:
        """Return where an image would be requested. See `UrlParser.parse`."""
        return self._parser.parse(image)

    def check(self, image: WebImage) -> None:
        """Raise what the fetch would raise: UnsupportedSource, InvalidUrl or ForbiddenAddress."""
        target = self.parse(image)
        if target.scheme in STORES:
            return
        host = target.host
        if host not in self._refusals:
            self._refusals[host] = self._refusal(host)
        if (refusal := self._refusals[host]) is not None:
            raise named(refusal, source_label(image))

    def _refusal(self, host: str) -> FetchError | None:
        """Return the error that every URL of a host has; its text has no name of an image."""
        try:
            check_host(host, through_proxy=self._through_proxy)
            check_name(host)
            addresses = ["127.0.0.1", "::1"] if host == "localhost" else [numeric_address(host)]
            known = [address for address in addresses if address is not None]
            if known and not any(self._guard.allows(address, host) for address in known):
                raise AddressRefused(known[0], host)
        except (AddressRefused, ValueError) as exception:
            error = classify(exception)
            return None if isinstance(error, TransientError) else error
        return None
