"""A model's name to a folder with its files, and whether this engine can serve it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ...errors import ModelError

FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
NOT_FILES = ("original/*", "onnx/*", "consolidated*")
"""Second copies of the weights that some repositories carry in other forms."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's files in a folder."""

    path: str
    revision: str | None = None
    """The commit, of a model from a hub."""

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in Path(self.path).glob("*.safetensors"))


def find(model: str, revision: str | None = None, code: bool = False) -> Checkpoint:
    """The folder of a model: itself where it is one, else downloaded from the Hugging Face hub into its cache.

    `code` fetches the repository's own Python files as well. A token is taken from the environment (HF_TOKEN).
    Raises ModelError.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ModelError(f"{model}: is a folder, and has no --revision {revision}: that is for models of the hub")
        return _checked(Checkpoint(str(folder.resolve())), model)
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise ModelError(f"{model}: no such folder: want a folder of a Hugging Face checkpoint, or a name of its hub")
    where = f"{model}" + (f", revision {revision}" if revision else "")
    try:
        found = snapshot_download(
            model,
            revision=revision,
            allow_patterns=[*FILES, "*.py"] if code else list(FILES),
            ignore_patterns=list(NOT_FILES),
            token=os.environ.get("HF_TOKEN"),
        )
    except HFValidationError:
        raise ModelError(f"{model}: no such folder, and no name of the Hugging Face hub (owner/name) either") from None
    except GatedRepoError:
        raise ModelError(
            f"{where}: the model is gated: accept its terms on https://huggingface.co/{model} "
            "and set HF_TOKEN to a token of that account"
        ) from None
    except RevisionNotFoundError:
        raise ModelError(f"{where}: the model has no such revision") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{where}: neither a folder here nor a model on the Hugging Face hub (if it is private, set HF_TOKEN)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{where}: no such folder here, not in the hub's cache, and the Hugging Face hub cannot be reached: "
            f"give a folder, or download the model beforehand with `hf download {model}` ({_first_line(error)})"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(f"{where}: downloading from the Hugging Face hub failed: {_first_line(error)}") from None
    return _checked(Checkpoint(found, Path(found).name), model)


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
        raise ModelError(f"{model}: config.json cannot be read: {_first_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "AutoModelForImageTextToText" not in remote:
        architectures = ", ".join(raw.get("architectures") or [str(kind)])
        raise ModelError(f"{model}: {architectures} does not answer questions about pictures (no image-text-to-text)")
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """Tokens that the model's language half has positions for; None where it does not say."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def _checked(checkpoint: Checkpoint, model: str) -> Checkpoint:
    if not (Path(checkpoint.path) / "config.json").is_file():
        raise ModelError(f"{model}: found no config.json in {checkpoint.path}: not a Hugging Face checkpoint")
    if not checkpoint.weight_bytes:
        raise ModelError(f"{model}: found no *.safetensors in {checkpoint.path}: weights of other forms are not loaded")
    return checkpoint


def _first_line(error: Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
