"""Sampling settings: those of the run, and what a row's `generation` changes."""

from __future__ import annotations

import math
from dataclasses import fields
from hashlib import blake2b
from typing import Any, get_type_hints

import msgspec

from ..config.options import SamplingOptions
from ..config.units import explain
from ..errors import InvalidGeneration, OptionError
from ..types import Row, Sampling

GREEDY = 1e-5
"""A temperature below this one means greedy decoding: it is too small to divide logits by in their precision."""

_ALIASES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
_HINTS = get_type_hints(SamplingOptions, include_extras=True)
_SETTINGS = {field.name: _HINTS[field.name] for field in fields(SamplingOptions)}
_MAX_INT = 2**63 - 1


def run_sampling(options: SamplingOptions) -> Sampling:
    """Return the settings of a run, which rows start from.

    Raises:
        OptionError: A stop string is empty.
    """
    if not all(options.stop):
        raise OptionError("--stop: found an empty string, expected text that ends an answer")
    return _normalize(Sampling(**{name: getattr(options, name) for name in _SETTINGS}))


def _normalize(settings: Sampling) -> Sampling:
    return settings if settings.temperature >= GREEDY else msgspec.structs.replace(settings, temperature=0.0)


def row_seed(seed: int, number: int) -> int:
    """Return a row's seed, 63 bits: the same in every shard, attempt and version.

    >>> row_seed(0, 1) == row_seed(0, 1) != row_seed(0, 2)
    True

    Args:
        seed: The run's seed.
        number: The row's number.
    """
    return int.from_bytes(blake2b(b"%d:%d" % (seed, number), digest_size=8).digest(), "little") & _MAX_INT


class RowSampling:
    """Make each row's settings from the run's."""

    def __init__(self, options: SamplingOptions) -> None:
        self._run = run_sampling(options)

    def for_row(self, row: Row) -> Sampling:
        """Return the row's settings, with a seed of its own unless decoding is greedy.

        Raises:
            InvalidGeneration: The row's `generation` has an unknown setting or a bad value.
        """
        if not row.generation and not self._run.temperature:
            return self._run
        settings = _parse(row.generation or {})
        settings.setdefault("seed", row_seed(self._run.seed, row.number))
        return _normalize(msgspec.structs.replace(self._run, **settings))


def _parse(generation: dict[str, Any]) -> dict[str, Any]:
    """Return a row's settings by the names of `Sampling`. Raises InvalidGeneration."""
    settings: dict[str, Any] = {}
    for key, value in generation.items():
        name = _ALIASES.get(key, key)
        if name not in _SETTINGS:
            known = ", ".join((*_SETTINGS, *_ALIASES))
            raise InvalidGeneration(f"generation: unknown setting {key!r:.60}; expected {known}")
        if name in settings:
            raise InvalidGeneration(f"generation: found both {key} and another name of it, expected one")
        settings[name] = _parse_setting(key, _SETTINGS[name], value)
    return settings


def _parse_setting(name: str, kind: Any, value: Any) -> Any:
    if name == "stop" and isinstance(value, str):
        value = (value,)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MAX_INT:
        value = int(value)  # pandas turns integers in a column with nulls into floats
    try:
        value = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidGeneration(f"generation: {name}: {explain(error)}; found {value!r:.60}") from None
    if (isinstance(value, int) and value > _MAX_INT) or (isinstance(value, float) and not math.isfinite(value)):
        raise InvalidGeneration(f"generation: {name}: found {value!r:.60}, expected a finite number of at most 64 bits")
    if isinstance(value, tuple) and not all(value):
        raise InvalidGeneration(f"generation: {name}: found an empty string, expected text that ends an answer")
    return value
