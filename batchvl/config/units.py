"""Types of option values beyond numbers and text: sizes, durations, shards, GPUs, proxies, limits on failures."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

from ..errors import OptionError

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_TYPE_NAMES = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}

_PROXY = re.compile(
    r"http://(?:(?P<user_info>[^/?#@\[\]\s]*)@)?(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\]):(?P<port>[0-9]{1,5})/?",
    re.IGNORECASE,
)

_MAX_SIZE = 2**50
_MAX_GPUS = 64
_MAX_SECONDS = 366 * 86400.0


class Gpus(int):
    """A number of GPUs, or 0 for all of them; written as a number or `all`."""

    @classmethod
    def parse(cls, value: Any) -> Gpus:
        text = str(value).strip().lower()
        if text != "all" and not (text.isdecimal() and 1 <= int(text) <= _MAX_GPUS):
            raise ValueError("expected a number of GPUs (1, 2, …) or 'all'")
        return cls(0 if text == "all" else text)

    def __str__(self) -> str:
        return str(int(self)) if self else "all"


class Size(int):
    """A number of bytes, written as 500000, 32MB or 4GiB."""

    @classmethod
    def parse(cls, value: Any) -> Size:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", str(value).strip().lower())
        size = float(match[1]) * _BYTES[match[2] or ""] if match else 0.0
        if not 1 <= size <= _MAX_SIZE:
            raise ValueError("expected a size, such as 500000 (bytes), 32MB or 4GiB")
        return cls(size)

    def __str__(self) -> str:
        for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self and self % factor == 0:
                return f"{self // factor}{unit}"
        return str(int(self))


class Duration(float):
    """A number of seconds, written as 90, 90s, 15m or 2h."""

    @classmethod
    def parse(cls, value: Any) -> Duration:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|)", str(value).strip().lower())
        seconds = float(match[1]) * _SECONDS[match[2]] if match else None
        if seconds is None or seconds > _MAX_SECONDS:
            raise ValueError("expected a duration of at most a year, such as 90 (seconds), 15m or 2h")
        return cls(seconds)

    def __str__(self) -> str:
        for unit, factor in (("h", 3600), ("m", 60)):
            if self and self % factor == 0:
                return f"{self / factor:g}{unit}"
        return f"{float(self):g}s"


class Timeout(Duration):
    """A `Duration` above 0, after which something fails."""

    @classmethod
    def parse(cls, value: Any) -> Timeout:
        seconds = Duration.parse(value)
        if not seconds:
            raise ValueError("expected a duration above 0 (for practically no limit, a long one such as 7d)")
        return cls(seconds)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of the manifest's rows, 0 <= index < count; written I/N."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, value: Any) -> Shard:
        match = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
        if not match or not int(match[1]) < int(match[2]):
            raise ValueError("expected I/N with 0 <= I < N, such as 0/8")
        return cls(int(match[1]), int(match[2]))

    def rows(self, total: int) -> range:
        """Return this shard's rows of a manifest with `total` rows.

        >>> Shard(1, 3).rows(10)
        range(3, 6)
        """
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Proxy:
    """An HTTP proxy, written http://HOST:PORT or http://USER:PASSWORD@HOST:PORT.

    As text it has neither user nor password, and no error quotes what it is made from.

    Attributes:
        host: Name or address, without brackets.
        port: Port.
        authorization: Value of the Proxy-Authorization header, if there is a user or a password.
    """

    __slots__ = ("authorization", "host", "port")

    def __init__(self, host: str, port: int, authorization: str | None = None) -> None:
        self.host, self.port, self.authorization = host, port, authorization

    @classmethod
    def parse(cls, value: Any) -> Proxy:
        match = _PROXY.fullmatch(str(value).strip())
        if match is None or not 0 < int(match["port"]) < 65536:
            raise ValueError(
                "expected http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, special characters in USER and PASSWORD "
                "percent-encoded"
            )
        user, _, password = (match["user_info"] or "").partition(":")
        if not user and not password:
            return cls(match["host"].strip("[]").lower(), int(match["port"]))
        if b":" in unquote_to_bytes(user):
            raise ValueError("the user of a proxy cannot contain a colon")
        credentials = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
        return cls(match["host"].strip("[]").lower(), int(match["port"]), f"Basic {b64encode(credentials).decode()}")

    def __str__(self) -> str:
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Proxy({self})"


def dec_hook(kind: type, value: Any) -> Any:
    """Decode a value of one of these types: msgspec's `dec_hook`."""
    return value if isinstance(value, kind) else kind.parse(value)  # type: ignore[attr-defined]


def enc_hook(value: Any) -> Any:
    """Encode a value of one of these types: msgspec's `enc_hook`. Sizes and durations become numbers, others text."""
    return float(value) if isinstance(value, Duration) else int(value) if isinstance(value, Size) else str(value)


def explain(error: Exception) -> str:
    """Rephrase a validation error of msgspec in plain words. Errors of `dec_hook` are returned as they are.

    >>> explain(ValueError("Expected `int` >= 1 - at `$.batch_size`"))
    'expected a whole number >= 1'
    """
    reason = re.sub(r" - at `\$.*`|, got `\w+`", "", str(error))
    return re.sub(
        r"Expected `(\w+)(?: \| null)?`", lambda match: f"expected {_TYPE_NAMES.get(match[1], match[1])}", reason
    )


def parse_failure_limit(text: str, total: int, source: str = "") -> float:
    """Parse a limit on failed rows, written as a number or as a percentage of all rows.

    Args:
        text: The limit, such as "100" or "1%".
        total: Number of rows of which the percentage is taken.
        source: The flag or variable that holds the limit, for the error message.

    Raises:
        OptionError: The text is neither.

    >>> parse_failure_limit("5", 200), parse_failure_limit("5%", 200)
    (5.0, 10.0)
    """
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or float(match[2] or 0) > 100:
        prefix = source and f"{source}: "
        raise OptionError(f"{prefix}expected a number (100) or a percentage (1%) of rows; found {text!r}")
    return float(match[1]) if match[1] else float(match[2]) * total / 100


def pluralize(number: int, noun: str = "row") -> str:
    """Format a count with its noun.

    >>> pluralize(1), pluralize(1200), pluralize(0, "image")
    ('1 row', '1,200 rows', '0 images')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"
