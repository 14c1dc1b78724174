"""From a model's name to a model that answers: first what it is, then its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from ..checkpoint import Checkpoint, find, first_line
from ..cuda import wait_for_memory
from .conversation import Conversation, TokenDecoder
from .device import DTYPES, choose_device, choose_dtype, default_threads, describe
from .generation import Generation
from .preparation import ProcessorPreparation
from .processor import template_sha256

CPU_BATCH, GPU_BATCH = 16, 32


@dataclass(frozen=True)
class LoadedModel:
    """A model that answers."""

    info: EngineInfo
    generation: Generation
    words: TokenDecoder


class ResolvedModel:
    """A model's files, its processor, and where it is going to run; its weights are not loaded.

    Raises a UsageError for a model that is not found or not served, and a device that is not there.
    """

    def __init__(self, spec: EngineSpec) -> None:
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._spec = spec
        self._device = choose_device(spec.device)
        self._dtype = choose_dtype(spec.dtype, self._device)
        self._checkpoint = find(spec.model, spec.revision, spec.trust_remote_code)
        self._config = configuration(self._checkpoint, spec.model, spec.trust_remote_code)
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
            text_too=True,
            special_tokens=self._preparation.special_tokens(),
        )

    def load(self, say: Callable[[str], None], threads: int | None = None, attention: str | None = None) -> LoadedModel:
        """Loads the weights, sets the threads that a CPU computes with, and asks for one token.

        say: told where the GPU's memory is waited for.
        Raises EngineUnavailable where the weights do not fit, ModelError where the model does not work.
        """
        if self._device.type == "cpu":
            torch.set_num_threads(threads or default_threads())
        if self._device.type == "cuda":
            wait_for_memory(self._device.index, self._checkpoint.weight_bytes, say)
        model = self._weights(attention)
        tokenizer = self._preparation.processor.tokenizer
        words = TokenDecoder(tokenizer, _end_tokens(model, tokenizer))
        context = context_length(self._config)
        generation = Generation(model, self._preparation.family, context, words.padding)
        self._try(generation, words)
        size = self._spec.batch_size or (CPU_BATCH if self._device.type == "cpu" else GPU_BATCH)
        info = EngineInfo(
            engine="transformers",
            version=f"{transformers.__version__} (torch {torch.__version__})",
            model=self._spec.model,
            backend=describe(self._device),
            revision=self._checkpoint.revision,
            template_sha256=template_sha256(self._preparation.processor),
            dtype=self._dtype,
            context=context,
            batch_size=size,
            rows=2 * size,  # while a batch is computed, the next lies ready
        )
        return LoadedModel(info, generation, words)

    def _weights(self, attention: str | None) -> Any:
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

    def _try(self, generation: Generation, words: TokenDecoder) -> None:
        ask = Message("user", (ContentPart(image=0), ContentPart(text="?")))
        request = Request(-1, (ask,), sampling=Sampling(max_new_tokens=1))
        arrays = {
            name.removesuffix(":bfloat16"): torch.from_numpy(array).view(DTYPES["bfloat16"])
            if name.endswith(":bfloat16")
            else torch.from_numpy(array)
            for name, array in self._preparation.prepare(request, [Image.new("RGB", (64, 48))]).items()
        }
        row = Conversation(request, arrays, words)
        generation.answer([row], lambda _: None)
        if row.failure:
            raise ModelError(
                f"{self._spec.model}: a first question about a blank picture failed: {row.failure.message}"
            )

    def _does_not_fit(self) -> str:
        size = self._checkpoint.weight_bytes / 2**30
        where = f"{self._spec.model}: its files hold {size:.1f} GiB of weights, loaded as {self._dtype}; "
        if self._device.type == "cpu":
            return where + "there is not enough memory for them here"
        free, total = (number / 2**30 for number in torch.cuda.mem_get_info(self._device))
        return (
            f"{where}{describe(self._device)} has {free:.1f} of {total:.1f} GiB free: "
            "take a smaller model, a larger GPU, or end what else uses this one"
        )


def _end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """The tokens that end an answer: those of the model's generation settings, its configuration and its tokenizer."""
    ends: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        found = getattr(source, "eos_token_id", None)
        ends.update(found if isinstance(found, list | tuple) else [] if found is None else [found])
    return ends


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
