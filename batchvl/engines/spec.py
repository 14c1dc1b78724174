"""What an engine's process is told, made of the run's options."""

from __future__ import annotations

from typing import Any

import msgspec

from .. import shapes
from ..errors import OptionError
from ..options import RunOptions
from ..sampling import sampling
from .protocol import EngineSpec


def spec_of(options: RunOptions) -> EngineSpec:
    """The spec of the engine that `options` name. Raises OptionError where an --engine-option is none."""
    model, engine = options.model, options.engine
    return EngineSpec(
        engine=engine.engine,
        model=str(shapes.MODEL) if model.model == "shapes" else model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        max_tiles=model.max_tiles,
        batch_size=engine.batch_size,
        dtype=model.dtype,
        device=engine.device,
        sampling=sampling(options.sampling),
        options=dict(key_value(option) for option in engine.engine_option),
    )


def key_value(option: str) -> tuple[str, Any]:
    """An --engine-option: the value as JSON where it is some, else as text.

    >>> key_value("lists_open=2"), key_value("refuse=no GPU")
    (('lists_open', 2), ('refuse', 'no GPU'))
    """
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--engine-option: {option!r} is no KEY=VALUE")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
