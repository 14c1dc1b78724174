"""The registry of engines: everything that batchvl knows about an engine without importing it.

To add an engine: write its package below `batchvl/engines/`, add its name (and its option group, if it has options of
its own) to `config/options.py`, and add one `EngineType` to `ENGINE_TYPES`. Only an engine's own process imports its
libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec

from .. import shapes
from ..config.options import RunOptions, default, flag
from ..errors import EngineUnavailable, OptionError
from ..hardware.gpus import visible_gpus
from ..ipc.arena import ArenaView
from ..prompts.sampling import run_sampling
from .base import Engine, EngineSpec


@dataclass(frozen=True, slots=True)
class Library:
    """A library that engines need, as `batchvl doctor` examines it."""

    name: str
    package: str
    """The Python package whose presence means that the library is installed."""
    probe: str = "batchvl.engines.probe:import_package"
    """ "module:function": called with `package` in a process of its own, returns `LibraryFacts`."""
    versions: str = ""
    """Supported versions, as pyproject.toml requires them: ">=0.18,<0.19"."""
    extra: str = ""
    """The extra of batchvl that installs it."""
    title: str = ""
    """Its name in messages, if not `name`."""


TORCH = Library("torch", "torch", "batchvl.engines.probe:probe_torch", ">=2.6", "transformers")
TRANSFORMERS = Library(
    "transformers", "transformers", "batchvl.engines.probe:probe_transformers", ">=5", "transformers"
)
LMDEPLOY = Library("lmdeploy", "lmdeploy", versions=">=0.18,<0.19", extra="lmdeploy", title="LMDeploy")
TURBOMIND = Library("turbomind", "lmdeploy", "batchvl.engines.lmdeploy.libraries:probe", title="TurboMind")


def _one_gpu(options: RunOptions) -> int:
    return 1


@dataclass(frozen=True, slots=True)
class EngineType:
    """One engine: where its code is, what it needs and how it is described."""

    name: str
    """Value of `--engine`."""
    factory: str
    """ "module:class" of its `Engine`; imported only in the engine's process."""
    description: str
    """What it does, in one line, where engines are offered to the user."""
    option_group: str | None = None
    """Field of `RunOptions` with the options that only this engine has."""
    preload: str | None = None
    """Module of its preparation that image workers import before they fork, if importing it takes long."""
    libraries: tuple[Library, ...] = ()
    """Libraries without which it cannot run."""
    optional_libraries: tuple[Library, ...] = ()
    """Libraries without which it is slower."""
    extra: str | None = None
    """The extra of batchvl that installs its libraries; None if it needs none."""
    needs_gpu: bool = False
    automatic: bool = True
    """Whether `--engine auto` may choose it."""
    gpus_per_replica: Callable[[RunOptions], int] = _one_gpu
    """GPUs that each replica gets to itself under `--gpus`; 0 if it computes without any."""
    gpu_memory_advice: str = "lower --batch-size, --max-tiles or --max-new-tokens, or use a smaller model"
    """What to do when the GPU's memory is full."""

    def create(self, spec: EngineSpec, arena: ArenaView) -> Engine:
        """Import the engine and construct it. For engine processes only."""
        module, _, attribute = self.factory.partition(":")
        engine: Engine = getattr(import_module(module), attribute)(spec, arena)
        return engine

    def missing_libraries(self) -> list[str]:
        """Names of the libraries that it needs and that are not installed."""
        return [library.name for library in self.libraries if find_spec(library.package) is None]


ENGINE_TYPES: Mapping[str, EngineType] = {
    engine.name: engine
    for engine in (
        EngineType(
            "lmdeploy",
            "batchvl.engines.lmdeploy:LmdeployEngine",
            "runs InternVL and many other models on NVIDIA GPUs; the fastest",
            option_group="lmdeploy",
            preload="batchvl.engines.lmdeploy.preparation",
            libraries=(TORCH, LMDEPLOY),
            optional_libraries=(TURBOMIND,),
            extra="lmdeploy",
            needs_gpu=True,
            gpus_per_replica=lambda options: options.lmdeploy.tp,
            gpu_memory_advice="lower --cache-max-entry-count, --session-len or --engine-option max_batch_size=N, use a "
            "quantized model, or split the model over more GPUs (--tp)",
        ),
        EngineType(
            "transformers",
            "batchvl.engines.transformers:TransformersEngine",
            "runs Hugging Face models on a CPU or a GPU",
            preload="batchvl.engines.transformers.preparation",
            libraries=(TORCH, TRANSFORMERS),
            extra="transformers",
        ),
        EngineType(
            "fake",
            "batchvl.engines.fake:FakeEngine",
            "runs no model: for trying out a manifest",
            automatic=False,
            gpus_per_replica=lambda options: 0,
        ),
    )
}
"""Every engine by name; `--engine auto` tries them in this order."""

LIBRARIES: Mapping[str, Library] = {
    library.name: library
    for engine in ENGINE_TYPES.values()
    for library in (*engine.libraries, *engine.optional_libraries)
}
"""Every library that engines need, by name, in the order in which `batchvl doctor` reports them."""


def choose_engine(name: str, device: str = "auto") -> str:
    """Return the engine that a run uses: `name`, or for "auto" the first one that can run on this machine.

    Args:
        name: Value of `--engine`.
        device: Value of `--device`: an engine that needs a GPU is not chosen for "cpu".

    Raises:
        EngineUnavailable: "auto" found no engine; the message says what to install.
    """
    if name != "auto":
        return name
    missing: list[str] = []
    for engine in ENGINE_TYPES.values():
        if not engine.automatic or (engine.needs_gpu and (device == "cpu" or not visible_gpus())):
            continue
        if not (missing := engine.missing_libraries()):
            return engine.name
    ways = [
        (f"pip install 'batchvl[{engine.extra}]'" if engine.extra else f"--engine {engine.name}", engine.description)
        for engine in ENGINE_TYPES.values()
    ]
    width = max(len(way) for way, _ in ways)
    raise EngineUnavailable(
        f"no engine can run here: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed in this "
        "Python environment\n" + "\n".join(f"  {way:{width}}   {description}" for way, description in ways)
    )


def engine_spec(options: RunOptions) -> EngineSpec:
    """Return the spec of the engine that `options` name.

    Raises:
        OptionError: An `--engine-option` is malformed, or an option belongs to another engine.
    """
    model, engine = options.model, ENGINE_TYPES[options.engine.engine]
    for other in ENGINE_TYPES.values():
        if other is engine or other.option_group is None:
            continue
        group = getattr(options, other.option_group)
        for field in fields(group):
            if getattr(group, field.name) != default(field):
                raise OptionError(
                    f"{flag(field.name)}: applies only to --engine {other.name}; this run uses {engine.name}"
                )
    return EngineSpec(
        engine=engine.name,
        model=str(shapes.MODEL) if model.model == "shapes" else model.model,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        max_tiles=model.max_tiles,
        draft_decode=options.image.draft_decode,
        batch_size=options.engine.batch_size,
        dtype=model.dtype,
        device=options.engine.device,
        sampling=run_sampling(options.sampling),
        options=dict(parse_key_value(option) for option in options.engine.engine_option),
        flags=asdict(getattr(options, engine.option_group)) if engine.option_group else {},
        hang_timeout=float(options.engine.hang_timeout),
    )


def parse_key_value(option: str) -> tuple[str, Any]:
    """Parse an `--engine-option`: the value as JSON if it is valid JSON, else as text.

    >>> parse_key_value("rows=64"), parse_key_value("refuse=no GPU")
    (('rows', 64), ('refuse', 'no GPU'))
    """
    key, equals, value = option.partition("=")
    if not equals or not key:
        raise OptionError(f"--engine-option: expected KEY=VALUE, found {option!r}")
    try:
        return key, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return key, value
