"""How each row's answer is drawn: the run's settings, and what a row's `generation` changes of them."""

from __future__ import annotations

import math
from hashlib import blake2b
from typing import Any, get_type_hints

import msgspec

from ..config.options import SamplingOptions
from ..config.units import explain
from ..errors import InvalidGeneration, OptionError
from ..types import Row, Sampling

_ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_SETTINGS = get_type_hints(SamplingOptions, include_extras=True)
_MOST = 2**63 - 1


GREEDY = 1e-5
"""A temperature below this one is greedy: dividing logits by less has no meaning in their precision."""


def sampling(options: SamplingOptions) -> Sampling:
    """The settings of a run, as rows take them over. Raises OptionError for a stop text that is empty."""
    if not all(options.stop):
        raise OptionError("--stop: found an empty string, want text that ends an answer")
    return _cooled(Sampling(**{name: getattr(options, name) for name in _SETTINGS}))


def _cooled(settings: Sampling) -> Sampling:
    return settings if settings.temperature >= GREEDY else msgspec.structs.replace(settings, temperature=0.0)


def row_seed(seed: int, number: int) -> int:
    """A row's seed, 63 bits: the same in every shard, attempt and version.

    >>> row_seed(0, 1) == row_seed(0, 1) != row_seed(0, 2)
    True
    """
    return int.from_bytes(blake2b(b"%d:%d" % (seed, number), digest_size=8).digest(), "little") & _MOST


class RowSampling:
    """Makes each row's settings from the run's."""

    def __init__(self, options: SamplingOptions) -> None:
        self._base = sampling(options)

    def of(self, row: Row) -> Sampling:
        """The row's settings, with a seed of its own where it draws. Raises InvalidGeneration."""
        if not row.generation and not self._base.temperature:
            return self._base
        given = _settings(row.generation or {})
        given.setdefault("seed", row_seed(self._base.seed, row.number))
        return _cooled(msgspec.structs.replace(self._base, **given))


def _settings(generation: dict[str, Any]) -> dict[str, Any]:
    """A row's settings by `Sampling`'s names. Raises InvalidGeneration."""
    settings: dict[str, Any] = {}
    for given, value in generation.items():
        name = _ALIASES.get(given, given)
        if name not in _SETTINGS:
            expected = ", ".join((*_SETTINGS, *_ALIASES))
            raise InvalidGeneration(f"generation: unknown setting {given!r:.60}; want {expected}")
        if name in settings:
            raise InvalidGeneration(f"generation: {given} and its other name are both given; want one")
        settings[name] = _setting(given, _SETTINGS[name], value)
    return settings


def _setting(name: str, kind: Any, value: Any) -> Any:
    if name == "stop" and isinstance(value, str):
        value = (value,)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MOST:
        value = int(value)  # pandas makes floats of integers that stand among nulls
    try:
        value = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidGeneration(f"generation: {name}: {explain(error)}; found {value!r:.60}") from None
    if (isinstance(value, int) and value > _MOST) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidGeneration(f"generation: {name}: found {value!r:.60}, want a finite number of 64 bits")
    if isinstance(value, tuple) and not all(value):
        raise InvalidGeneration(f"generation: {name}: found an empty string, want text that ends an answer")
    return value
