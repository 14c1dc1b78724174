"""What options are made of besides numbers and text: sizes, times, shards, bounds on failures."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import OptionError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


_LARGEST = 2**50
_MOST_GPUS = 64
_LONGEST = 366 * 86400.0


def pluralize(number: int, what: str = "row") -> str:
    """So many of them, for people.

    >>> pluralize(1), pluralize(1200), pluralize(0, "picture")
    ('1 row', '1,200 rows', '0 pictures')
    """
    return f"{number:,} {what}{'s' * (number != 1)}"


class Gpus(int):
    """A number of GPUs, written as such or as all; 0 is all."""

    @classmethod
    def parse(cls, value: Any) -> Gpus:
        text = str(value).strip().lower()
        if text != "all" and not (text.isdecimal() and 1 <= int(text) <= _MOST_GPUS):
            raise ValueError(f"{value!r} is no number of GPUs: want 1, 2, … or all")
        return cls(0 if text == "all" else text)

    def __str__(self) -> str:
        return str(int(self)) if self else "all"


class Size(int):
    """A number of bytes, written as 500000, 32MB or 4GiB."""

    @classmethod
    def parse(cls, value: Any) -> Size:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", str(value).strip().lower())
        size = float(found[1]) * _UNITS[found[2] or ""] if found else 0.0
        if not 1 <= size <= _LARGEST:
            raise ValueError(f"{value!r} is no size: want bytes, such as 500000, 32MB or 4GiB")
        return cls(size)

    def __str__(self) -> str:
        for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if self and self % bytes_ == 0:
                return f"{self // bytes_}{unit}"
        return str(int(self))


class Duration(float):
    """A number of seconds, written as 90, 90s, 15m or 2h."""

    @classmethod
    def parse(cls, value: Any) -> Duration:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|)", str(value).strip().lower())
        seconds = float(found[1]) * _SECONDS[found[2]] if found else _LONGEST + 1
        if seconds > _LONGEST:
            raise ValueError(f"{value!r} is no duration: want seconds, such as 90, 90s, 15m or 2h")
        return cls(seconds)

    def __str__(self) -> str:
        return f"{float(self):g}s"


class Timeout(Duration):
    """A Duration after which something is given up: never 0, which would give up everything."""

    @classmethod
    def parse(cls, value: Any) -> Timeout:
        seconds = Duration.parse(value)
        if not seconds:
            raise ValueError(
                f"{value!r} would give up everything: want a time above 0; a long one is no limit, such as 7d"
            )
        return cls(seconds)


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of the manifest's rows, 0 <= index < count; written I/N."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, value: Any) -> Shard:
        found = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
        if not found or not int(found[1]) < int(found[2]):
            raise ValueError(f"{value!r} is no shard: want I/N with 0 <= I < N, such as 0/8")
        return cls(int(found[1]), int(found[2]))

    def rows(self, total: int) -> range:
        """The shard's rows of `total`.

        >>> Shard(1, 3).rows(10)
        range(3, 6)
        """
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def dec_hook(kind: type, value: Any) -> Any:
    """msgspec's dec_hook for the types of options."""
    return value if isinstance(value, kind) else kind.parse(value)  # type: ignore[attr-defined]


_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def explain(error: Exception) -> str:
    """What msgspec, or a `dec_hook`, wants instead of a value, in plain words.

    >>> explain(ValueError("Expected `int` >= 1 - at `$.batch_size`"))
    'want a whole number >= 1'
    """
    reason = re.sub(r" - at `\$.*`|, got `\w+`", "", str(error))
    return re.sub(r"Expected `(\w+)(?: \| null)?`", lambda match: f"want {_WORDS.get(match[1], match[1])}", reason)


def enc_hook(value: Any) -> Any:
    """msgspec's enc_hook for the types of options: numbers stay numbers, the rest is as it is written."""
    return float(value) if isinstance(value, Duration) else int(value) if isinstance(value, Size) else str(value)


def parse_failure_limit(text: str, of: int, where: str = "") -> float:
    """A bound written as a number of rows or as P% of `of` rows. Raises OptionError, naming `where`.

    >>> parse_failure_limit("5", 200), parse_failure_limit("5%", 200)
    (5.0, 10.0)
    """
    found = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", text.strip())
    if not found or float(found[2] or 0) > 100:
        lead = where and f"{where}: "
        raise OptionError(
            f"{lead}{text!r} is no bound on failures: want a number of rows (100) or a share of them (1%)"
        )
    return float(found[1]) if found[1] else float(found[2]) * of / 100
