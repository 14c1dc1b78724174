"""Loading of a model in two steps: `ResolvedModel` has its files and its processor, `LoadedModel` its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from ...errors import EngineUnavailable, ModelError
from ...images.preparation import PreparationSpec
from ...types import ContentPart, Message, Request, Sampling
from ..base import EngineInfo, EngineSpec
from ..checkpoint import Checkpoint, find_checkpoint, first_line
from ..cuda import wait_for_memory
from .conversation import Conversation, TokenDecoder
from .device import DTYPES, choose_device, choose_dtype, default_threads, device_name
from .generation import Generation
from .preparation import BFLOAT16, ProcessorPreparation
from .processor import template_sha256

CPU_BATCH, GPU_BATCH = 16, 32
"""Default batch sizes."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to answer."""

    info: EngineInfo
    generation: Generation
    decoder: TokenDecoder


class ResolvedModel:
    """A model's files and processor and the device that it will run on; its weights are not loaded.

    Raises:
        UsageError: The model is not found or not supported, or the device does not exist.
    """

    def __init__(self, spec: EngineSpec) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._spec = spec
        self._device = choose_device(spec.device)
        self._dtype = choose_dtype(spec.dtype, self._device)
        self._checkpoint = find_checkpoint(spec.model, spec.revision, spec.trust_remote_code)
        self._config = load_config(self._checkpoint, spec.model, spec.trust_remote_code)
        options: dict[str, Any] = {
            "model": self._checkpoint.path,
            "dtype": self._dtype,
            "max_tiles": spec.max_tiles,
            "trust_remote_code": spec.trust_remote_code,
        }
        self._preparation = ProcessorPreparation(**options)
        self.preparation_spec = PreparationSpec(
            "batchvl.engines.transformers.preparation:ProcessorPreparation",
            options,
            prepares_text=True,
            special_tokens=self._preparation.special_tokens(),
        )

    def load(self, threads: int | None = None, attention: str | None = None) -> LoadedModel:
        """Load the weights, set the number of compute threads on a CPU, and generate one token as a check.

        Args:
            threads: Compute threads on a CPU; None is the default.
            attention: transformers' attention implementation; None is its default.

        Raises:
            EngineUnavailable: The weights do not fit.
            ModelError: The model does not work.
        """
        if self._device.type == "cpu":
            torch.set_num_threads(threads or default_threads())
        if self._device.type == "cuda":
            wait_for_memory(self._device.index, self._checkpoint.weight_bytes)
        model = self._load_weights(attention)
        tokenizer = self._preparation.processor.tokenizer
        decoder = TokenDecoder(tokenizer, end_token_ids(model, tokenizer))
        context = context_length(self._config)
        generation = Generation(model, self._preparation.family, context, decoder.pad_id)
        self._check(generation, decoder)
        size = self._spec.batch_size or (CPU_BATCH if self._device.type == "cpu" else GPU_BATCH)
        info = EngineInfo(
            engine="transformers",
            version=f"{transformers.__version__} (torch {torch.__version__})",
            model=self._spec.model,
            backend=device_name(self._device),
            revision=self._checkpoint.revision,
            template_sha256=template_sha256(self._preparation.processor),
            dtype=self._dtype,
            context=context,
            batch_size=size,
            rows=2 * size,  # while one batch is computed, the next is prepared
        )
        return LoadedModel(info, generation, decoder)

    def _load_weights(self, attention: str | None) -> Any:
        try:
            model = AutoModelForImageTextToText.from_pretrained(
                self._checkpoint.path,
                dtype=DTYPES[self._dtype],
                trust_remote_code=self._spec.trust_remote_code,
                **({"attn_implementation": attention} if attention else {}),
            )
            return model.to(self._device).eval()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise EngineUnavailable(self._does_not_fit()) from error
        except Exception as error:
            raise ModelError(f"{self._spec.model}: cannot be loaded: {type(error).__name__}: {error}") from error

    def _check(self, generation: Generation, decoder: TokenDecoder) -> None:
        """Generate one token about a blank image, so that a model that cannot work fails before the run starts."""
        question = Message("user", (ContentPart(image=0), ContentPart(text="?")))
        request = Request(-1, (question,), sampling=Sampling(max_new_tokens=1))
        arrays = {}
        for name, array in self._preparation.prepare(request, [Image.new("RGB", (64, 48))]).items():
            tensor = torch.from_numpy(array)
            arrays[name.removesuffix(BFLOAT16)] = tensor.view(torch.bfloat16) if name.endswith(BFLOAT16) else tensor
        row = Conversation(request, arrays, decoder)
        generation.answer([row], lambda _: None)
        if row.failure:
            raise ModelError(f"{self._spec.model}: the model fails on a blank image: {row.failure.message}")

    def _does_not_fit(self) -> str:
        size = self._checkpoint.weight_bytes / 2**30
        weights = f"{self._spec.model}: its files hold {size:.1f} GiB of weights, loaded as {self._dtype}; "
        if self._device.type == "cpu":
            return weights + "this machine does not have enough free memory for them"
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(self._device))
        return (
            f"{weights}{device_name(self._device)} has {free:.1f} of {total:.1f} GiB free: "
            "use a smaller model or a larger GPU, or end other processes on this one"
        )


def load_config(checkpoint: Checkpoint, model: str, trust_remote_code: bool) -> PretrainedConfig:
    """Return the configuration of a model that transformers can serve.

    Args:
        checkpoint: The model's files.
        model: The model's name, for messages.
        trust_remote_code: Whether the checkpoint's own Python code may run.

    Raises:
        ModelError: transformers cannot serve the model.
    """
    raw = json.loads((Path(checkpoint.path) / "config.json").read_text())
    model_type, remote = raw.get("model_type"), raw.get("auto_map", {})
    if model_type == "internvl_chat" or "InternVLChatModel" in raw.get("architectures", []):
        raise ModelError(
            f"{model}: transformers does not serve an InternVLChatModel: use the model's `-hf` conversion "
            "(such as OpenGVLab/InternVL3-1B-hf) or another engine (--engine lmdeploy)"
        )
    if model_type not in CONFIG_MAPPING_NAMES and not remote:
        raise ModelError(f"{model}: this version of transformers does not know models of type {model_type!r}")
    if model_type not in CONFIG_MAPPING_NAMES and not trust_remote_code:
        raise ModelError(
            f"{model}: models of type {model_type!r} come with their own Python code, which would run here: "
            "review it, then pass --trust-remote-code"
        )
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{model}: config.json cannot be read: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and "AutoModelForImageTextToText" not in remote:
        architectures = ", ".join(raw.get("architectures") or [str(model_type)])
        raise ModelError(f"{model}: {architectures} is not an image-text-to-text model")
    return config


def context_length(config: PretrainedConfig) -> int | None:
    """Return the number of positions of the model's language half, None if its configuration has none."""
    length: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length


def end_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer, from the model's generation settings, its configuration and tokenizer."""
    end_ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        end_ids.update(ids if isinstance(ids, list | tuple) else [] if ids is None else [ids])
    return end_ids
