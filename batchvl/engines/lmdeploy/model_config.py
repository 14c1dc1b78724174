"""A model's configuration as LMDeploy reads it, and what it says about the preparation of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lmdeploy.archs import get_model_arch
from lmdeploy.vl.engine import _resolve_mm_feature_dtype
from lmdeploy.vl.model.builder import VISION_MODELS
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ...errors import ModelError
from ..checkpoint import Checkpoint, first_line


def read_model_config(checkpoint: Checkpoint, model: str, trust_remote_code: bool) -> Any:
    """Return the model's configuration as LMDeploy reads it.

    Raises:
        ModelError: It cannot be read, or needs Python code that is not trusted or missing.
    """
    try:
        raw = json.loads((Path(checkpoint.path) / "config.json").read_text())
    except ValueError as error:
        raise ModelError(f"{model}: cannot read config.json: {first_line(error)}") from None
    kind, remote_code = raw.get("model_type"), raw.get("auto_map", {})
    needs_code = remote_code and kind not in CONFIG_MAPPING_NAMES
    if needs_code:
        if not trust_remote_code:
            raise ModelError(
                f"{model}: models of type {kind!r} come with their own Python code, which would run on this machine: "
                "review it and pass --trust-remote-code, or use a model that needs none, such as InternVL's `-hf` "
                "models"
            )
        if file := _missing_code(checkpoint, remote_code):
            raise ModelError(
                f"{model}: config.json refers to {file}, which is missing in {checkpoint.path}: copy the Python files "
                "of the model that it was made from"
            )
    try:
        if needs_code:
            AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=True)  # LMDeploy swallows its error
        _, config = get_model_arch(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{model}: cannot read config.json: {first_line(error)}") from error
    if not config.architectures:
        raise ModelError(f"{model}: config.json names no architecture")
    return config


def _missing_code(checkpoint: Checkpoint, auto_map: dict[str, Any]) -> str | None:
    """Return the Python file that a configuration needs, if the model's directory lacks it."""
    name = str(auto_map.get("AutoConfig") or "")
    if not name or "--" in name:  # "--": code of another repository
        return None
    file = f"{name.split('.')[0]}.py"
    return None if (Path(checkpoint.path) / file).is_file() else file


def can_prepare_outside(model_config: Any, backend: str) -> bool:
    """Return whether LMDeploy's engine takes a model's images as prepared on a CPU.

    TurboMind does if it computes the model's vision encoder itself. Otherwise it wants what torch computes.
    """
    kind = next((kind for kind in VISION_MODELS.module_dict.values() if kind.match(model_config)), None)
    return kind is not None and (backend == "pytorch" or kind._turbomind_native_vision)


def pixel_dtype(model_config: Any, engine_config: Any) -> torch.dtype | None:
    """Return the dtype in which an LMDeploy engine with this configuration will want pixels."""
    from lmdeploy import TurbomindEngineConfig

    model_dtype: torch.dtype | None = _resolve_mm_feature_dtype(model_config, engine_config)
    vision = getattr(model_config, "vision_config", None)
    if not isinstance(engine_config, TurbomindEngineConfig) or vision is None:
        return model_dtype
    from lmdeploy.turbomind.converter import _resolve_dtype

    supported = {"float16"} | ({"bfloat16"} if torch.cuda.is_bf16_supported() else set())
    vision_dtype: torch.dtype = getattr(torch, _resolve_dtype(engine_config.dtype, vision, supported))
    return vision_dtype


def loaded_vision_dtype(source_model: Any) -> torch.dtype | None:
    """Return the dtype in which TurboMind has loaded a model's vision encoder; None if it has none."""
    from lmdeploy.turbomind import _tm

    dtypes = {_tm.DataType.TYPE_BF16: torch.bfloat16, _tm.DataType.TYPE_FP16: torch.float16}
    return dtypes.get(getattr(source_model, "_vision_data_type", None))
