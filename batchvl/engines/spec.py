"""What an engine's process is told, made of the run's options."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import msgspec

from .. import shapes
from ..config.options import LmdeployOptions, RunOptions, default, flag
from ..errors import OptionError
from ..prompts.sampling import sampling
from .base import EngineSpec


def engine_spec(options: RunOptions) -> EngineSpec:
    """The spec of the engine that `options` name.

    Raises OptionError where an --engine-option is none, or an option is for another engine.
    """
    model, engine = options.model, options.engine
    if engine.engine != "lmdeploy":
        for field in fields(LmdeployOptions):
            if getattr(options.lmdeploy, field.name) != default(field):
                raise OptionError(f"{flag(field.name)}: is for the engine lmdeploy; this run's is {engine.engine}")
    return EngineSpec(
        engine=engine.engine,
        model=str(shapes.MODEL) if model.model == "shapes" else model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        max_tiles=model.max_tiles,
        draft_decode=options.image.draft_decode,
        batch_size=engine.batch_size,
        dtype=model.dtype,
        device=engine.device,
        sampling=sampling(options.sampling),
        options=dict(key_value(option) for option in engine.engine_option),
        lmdeploy=asdict(options.lmdeploy) if engine.engine == "lmdeploy" else {},
        hang_timeout=float(engine.hang_timeout),
    )


def key_value(option: str) -> tuple[str, Any]:
    """An --engine-option: the value as JSON where it is some, else as text.

    >>> key_value("rows=64"), key_value("refuse=no GPU")
    (('rows', 64), ('refuse', 'no GPU'))
    """
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--engine-option: {option!r} is no KEY=VALUE")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
