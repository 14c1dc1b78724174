"""Which pictures are prepared outside LMDeploy's process, and the type of their pixels."""

from __future__ import annotations

from typing import Any

import torch
from lmdeploy.vl.engine import _resolve_mm_feature_dtype
from lmdeploy.vl.model.builder import VISION_MODELS


def prepared_elsewhere(hf_config: Any, backend: str) -> bool:
    """Whether LMDeploy's engine takes a model's pictures as prepared on a CPU.

    TurboMind takes those of models whose vision half it computes itself; of others it wants what torch computes.
    """
    kind = next((kind for kind in VISION_MODELS.module_dict.values() if kind.match(hf_config)), None)
    return kind is not None and (backend == "pytorch" or kind._turbomind_native_vision)


def pixel_type(hf_config: Any, config: Any) -> torch.dtype | None:
    """The type that LMDeploy's engine of that configuration is going to want pixels in."""
    from lmdeploy import TurbomindEngineConfig

    whole: torch.dtype | None = _resolve_mm_feature_dtype(hf_config, config)
    vision = getattr(hf_config, "vision_config", None)
    if not isinstance(config, TurbomindEngineConfig) or vision is None:
        return whole
    from lmdeploy.turbomind.converter import _resolve_dtype

    executable = {"float16"} | ({"bfloat16"} if torch.cuda.is_bf16_supported() else set())
    found: torch.dtype = getattr(torch, _resolve_dtype(config.dtype, vision, executable))
    return found


def vision_type(source_model: Any) -> torch.dtype | None:
    """The type that TurboMind has loaded a model's vision half in; None where it has none."""
    from lmdeploy.turbomind import _tm

    types = {_tm.DataType.TYPE_BF16: torch.bfloat16, _tm.DataType.TYPE_FP16: torch.float16}
    return types.get(getattr(source_model, "_vision_data_type", None))
