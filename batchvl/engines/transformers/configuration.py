"""Whether this engine can serve a model, by its configuration."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ...errors import ModelError
from ..checkpoint import Checkpoint, first_line


def configuration(checkpoint: Checkpoint, model: str, trust_remote_code: bool) -> PretrainedConfig:
    """The model's configuration, once it is clear that transformers can serve it. Raises ModelError."""
    raw = json.loads((Path(checkpoint.path) / "config.json").read_text())
    kind, remote = raw.get("model_type"), raw.get("auto_map", {})
    if kind == "internvl_chat" or "InternVLChatModel" in raw.get("architectures", []):
        raise ModelError(
            f"{model}: an InternVLChatModel is not served by transformers: take the model's `-hf` conversion "
            "(such as OpenGVLab/InternVL3-1B-hf) or another engine (--engine lmdeploy)"
        )
    if kind not in CONFIG_MAPPING_NAMES and not remote:
        raise ModelError(f"{model}: this version of transformers does not know models of type {kind!r}")
    if kind not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(
            f"{model}: models of type {kind!r} come with Python code of their own, which would run here: "
            "read it, then give --trust-remote-code"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{model}: config.json cannot be read: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "AutoModelForImageTextToText" not in remote:
        architectures = ", ".join(raw.get("architectures") or [str(kind)])
        raise ModelError(f"{model}: {architectures} does not answer questions about pictures (no image-text-to-text)")
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that the model's language half has positions for; None where it does not say."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length
