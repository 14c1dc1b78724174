"""The engines by name. Each is imported only in the process that runs it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from ..errors import EngineUnavailable
from ..hardware.gpus import visible_gpus
from .base import EngineFactory

ENGINES: Mapping[str, str] = {
    "lmdeploy": "batchvl.engines.lmdeploy:LmdeployEngine",
    "transformers": "batchvl.engines.transformers:TransformersEngine",
    "fake": "batchvl.engines.fake:FakeEngine",
}


PRELOADS: Mapping[str, str] = {
    "lmdeploy": "batchvl.engines.lmdeploy.preparation",
    "transformers": "batchvl.engines.transformers.preparation",
}
"""The module of an engine's preparation, where importing it takes long."""


def choose(name: str, device: str = "auto") -> str:
    """The engine that a run uses; "auto" is the best for what is installed here: lmdeploy where there is a GPU.

    Raises EngineUnavailable naming what is missing and the alternatives.
    """
    if name != "auto":
        return name
    if not _missing("lmdeploy", "torch") and device != "cpu" and visible_gpus():
        return "lmdeploy"
    if not (missing := _missing("torch", "transformers")):
        return "transformers"
    raise EngineUnavailable(
        f"no engine can run here: found no {' and no '.join(missing)} in this Python.\n"
        "  pip install 'batchvl[lmdeploy]'       runs InternVL and many others on an NVIDIA GPU, the fastest way\n"
        "  pip install 'batchvl[transformers]'   runs Hugging Face models on a CPU or a GPU\n"
        "  --engine fake                         answers nothing sensible, for trying out a manifest"
    )


def _missing(*libraries: str) -> list[str]:
    return [library for library in libraries if importlib.util.find_spec(library) is None]


def factory(name: str) -> EngineFactory:
    """The engine's class. Imports its libraries: for engine processes only."""
    module, _, attribute = ENGINES[name].partition(":")
    found: EngineFactory = getattr(importlib.import_module(module), attribute)
    return found
