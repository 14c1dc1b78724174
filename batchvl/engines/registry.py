"""The engines by name. Each is imported only in the process that runs it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from ..errors import EngineUnavailable
from .protocol import EngineFactory

ENGINES: Mapping[str, str] = {
    "transformers": "batchvl.engines.transformers:TransformersEngine",
    "fake": "batchvl.engines.fake:FakeEngine",
}


PRELOADS: Mapping[str, str] = {"transformers": "batchvl.engines.transformers.preparation"}
"""The module of an engine's preparation, where importing it takes long."""


def choose(name: str) -> str:
    """The engine that a run uses; "auto" is the best that is installed here.

    Raises EngineUnavailable naming what is missing and the alternatives.
    """
    if name != "auto":
        return name
    missing = [library for library in ("torch", "transformers") if importlib.util.find_spec(library) is None]
    if not missing:
        return "transformers"
    raise EngineUnavailable(
        f"no engine can run here: found no {' and no '.join(missing)} in this Python.\n"
        "  pip install 'batchvl[transformers]'   runs Hugging Face models on a CPU or a GPU\n"
        "  --engine fake                         answers nothing sensible, for trying out a manifest"
    )


def factory(name: str) -> EngineFactory:
    """The engine's class. Imports its libraries: for engine processes only."""
    module, _, attribute = ENGINES[name].partition(":")
    found: EngineFactory = getattr(importlib.import_module(module), attribute)
    return found
