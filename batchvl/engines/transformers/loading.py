"""From a model's name to a model that answers: first what it is, then its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText

from ...errors import EngineUnavailable, ModelError
from ...images.preparation import PreparationSpec
from ...request import Message, Part, Request, Sampling
from ..checkpoint import find
from ..gpu import wait_for_memory
from ..protocol import EngineInfo, EngineSpec
from .configuration import configuration, context_length
from .conversation import Conversation, Vocabulary
from .device import DTYPES, choose_device, choose_dtype, default_threads, describe
from .generation import Generation
from .preparation import ProcessorPreparation
from .processor import template_sha256

CPU_BATCH, GPU_BATCH = 16, 32


@dataclass(frozen=True)
class Loaded:
    """A model that answers."""

    info: EngineInfo
    generation: Generation
    words: Vocabulary


class Resolved:
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

    def load(self, say: Callable[[str], None], threads: int | None = None, attention: str | None = None) -> Loaded:
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
        words = Vocabulary(tokenizer, _end_tokens(model, tokenizer))
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
        return Loaded(info, generation, words)

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

    def _try(self, generation: Generation, words: Vocabulary) -> None:
        ask = Message("user", (Part(image=0), Part(text="?")))
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
