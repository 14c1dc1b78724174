"""A model's configuration, once it is clear that LMDeploy can read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmdeploy.archs import get_model_arch
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ...errors import ModelError
from ..checkpoint import Checkpoint, first_line


def configuration(checkpoint: Checkpoint, model: str, trust_remote_code: bool) -> Any:
    """The model's configuration as LMDeploy reads it. Raises ModelError."""
    try:
        raw = json.loads((Path(checkpoint.path) / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{model}: config.json cannot be read: {first_line(error)}") from None
    kind, remote = raw.get("model_type"), raw.get("auto_map", {})
    if remote and kind not in CONFIG_MAPPING_NAMES:
        if not trust_remote_code:
            raise ModelError(
                f"{model}: models of type {kind!r} come with Python code of their own, which would run here: "
                "read it, then give --trust-remote-code, or take a model that needs none, such as InternVL's `-hf` ones"
            )
        if missing := _missing_code(checkpoint, remote):
            raise ModelError(
                f"{model}: {', '.join(missing)} is missing in {checkpoint.path}, and config.json names it: copy the "
                "Python files of the model it was made from"
            )
    try:
        if remote and kind not in CONFIG_MAPPING_NAMES:
            AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)  # LMDeploy keeps its error to itself
        _, config = get_model_arch(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{model}: config.json cannot be read: {first_line(error)}") from error
    if not config.architectures:
        raise ModelError(f"{model}: config.json names no architecture")
    return config


def _missing_code(checkpoint: Checkpoint, remote: dict[str, Any]) -> list[str]:
    """Python files that a configuration needs and the folder lacks."""
    named = [str(remote.get(kind) or "") for kind in ("AutoConfig",)]
    files = [f"{name.split('.')[0]}.py" for name in named if name and "--" not in name]
    return [file for file in files if not (Path(checkpoint.path) / file).is_file()]
