"""From a model's name to a running pipeline: first its files and configuration, then its weights."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import deque
from typing import Any

import lmdeploy
import torch
from lmdeploy.archs import check_vl_llm
from PIL import Image
from transformers import AutoTokenizer

from ...errors import EngineUnavailable, ModelError, OptionError, UsageError
from ...hardware.limits import memory
from ...images.preparation import PreparationSpec
from .. import cuda
from ..base import EngineInfo, EngineSpec
from ..checkpoint import find_checkpoint, first_line
from .chat import Chat, ChatTemplate, image_settings, limit_tiles
from .engine_config import apply_memory_defaults, choose_backend, engine_config, language_config
from .handles import disable_streaming
from .inputs import TileBudget
from .model_config import can_prepare_outside, loaded_vision_dtype, pixel_dtype, read_model_config
from .precomputed import PrecomputedPromptProcessor
from .sampling import TokenizerInfo

SUPPORTED_SERIES = "0.18."
"""The versions of LMDeploy for which batchvl was written and measured."""
BATCH_SIZE = 32
PREPARATION_SLOTS = 8
"""Rows that LMDeploy's own preparation is given at a time. It prepares them one by one; the others wait in order."""


class LoadedModel:
    """A running pipeline.

    `preparation_slots`, `preparing`, `tile_budget` and `steps` are used on the pipeline's event loop, `loop`.
    """

    def __init__(self, pipe: Any, info: EngineInfo, chat: Chat, tokenizer_info: TokenizerInfo) -> None:
        self.pipe, self.info, self.chat, self.tokenizer_info = pipe, info, chat, tokenizer_info
        self.engine, self.sessions, self.loop = pipe.async_engine, pipe.session_mgr, pipe.internal_thread.loop
        self.stop_ids: list[int] = self.engine.stop_words or []
        self.keeps_prefixes = self.engine.backend == "turbomind" and self.engine.backend_config.enable_prefix_caching
        self.engine.prompt_processor = PrecomputedPromptProcessor(self.engine.prompt_processor)
        disable_streaming(self.sessions)
        self.preparation_slots = asyncio.Semaphore(PREPARATION_SLOTS)
        self.preparing = 0
        """Rows that hold one of them."""
        self.tile_budget = TileBudget(max(memory() // 8, 2**30))
        self.steps = 0


class ResolvedModel:
    """A model's files and configuration, and which of LMDeploy's engines will run it. No weights are loaded.

    Raises:
        ModelError: The model was not found or is not supported.
        EngineUnavailable: A GPU or a library is missing.
        OptionError: The settings are invalid.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._notes: list[str] = []
        self._is_supported_version = lmdeploy.__version__.startswith(SUPPORTED_SERIES)
        if not self._is_supported_version:
            self._note(f"LMDeploy {lmdeploy.__version__}: batchvl supports {SUPPORTED_SERIES}x")
        _require_gpus(spec.flags["tp"])
        self._checkpoint = find_checkpoint(spec.model, spec.revision, spec.trust_remote_code)
        path, trust_remote_code = self._checkpoint.path, spec.trust_remote_code
        self._model_config = read_model_config(self._checkpoint, spec.model, trust_remote_code)
        self._architecture: str = self._model_config.architectures[0]
        language = language_config(self._model_config)
        self._backend, note = choose_backend(
            spec.flags["backend"], spec.model, path, self._model_config, trust_remote_code
        )
        self._note(note)
        if not check_vl_llm(self._backend, self._model_config.to_dict()):
            raise ModelError(
                f"{spec.model}: LMDeploy does not support {self._architecture} as a vision-language model; "
                "--engine transformers may"
            )
        self.config = engine_config(spec, self._backend)
        """The configuration of LMDeploy's engine, complete after `wait_for_memory`."""
        trained_length = getattr(language, "max_position_embeddings", None)
        if trained_length and (self.config.session_len or 0) > trained_length:
            self._note(f"--session-len {self.config.session_len}: the model was trained for {trained_length} tokens")
        self._template = ChatTemplate(path, spec.flags["chat_template"], trust_remote_code)
        self._note(self._template.note)
        self._chat = Chat(self._architecture, image_settings(self._architecture, spec.max_tiles))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        self._tokenizer_info = TokenizerInfo(tokenizer, int(language.vocab_size))
        self._pixel_dtype = pixel_dtype(self._model_config, self.config) if self._is_supported_version else None
        self._memory_report = ""
        self.preparation_spec = self._preparation_spec()

    @property
    def wants_main_thread(self) -> bool:
        """Whether `load` must run in the main thread: LMDeploy's executor of several processes sets signal handlers."""
        return self._backend == "pytorch" and self.config.tp > 1

    def _preparation_spec(self) -> PreparationSpec:
        """Return what image workers do: everything before LMDeploy's engine, if that is known to give the same."""
        special = tuple(self._tokenizer_info.special)
        if not (self._is_supported_version and can_prepare_outside(self._model_config, self._backend)):
            self._note(
                f"LMDeploy itself prepares the images for {self._architecture}, one at a time: the GPU may wait for it"
            )
            return PreparationSpec("batchvl.engines.lmdeploy.preparation:RawImages", special_tokens=special)
        options = {
            "model": self._checkpoint.path,
            "architecture": self._architecture,
            "trust_remote_code": self._spec.trust_remote_code,
            "dtype": self._pixel_dtype and str(self._pixel_dtype).removeprefix("torch."),
            "template": self._template.fields,
            "max_tiles": self._spec.max_tiles,
            "draft_decode": self._spec.draft_decode,
            "fingerprints": self._backend == "turbomind",
        }
        return PreparationSpec(
            "batchvl.engines.lmdeploy.preparation:LmdeployPreparation", options, special_tokens=special
        )

    def wait_for_memory(self) -> None:
        """Wait for the GPU's memory, then complete the configuration.

        Raises:
            EngineUnavailable: The weights do not fit.
        """
        weights = self._checkpoint.weight_bytes // self._spec.flags["tp"]
        cuda.wait_for_memory(0, weights)
        if self._backend == "turbomind":
            free = cuda.memory()[0] - weights
            apply_memory_defaults(self.config, self._spec.options, language_config(self._model_config), free)
        self._memory_report = self._describe_memory(weights)
        # For the log: if the memory is too small, TurboMind ends the process, and this is part of its last lines.
        print(self._memory_report, file=sys.stderr, flush=True)
        if cuda.memory()[0] < weights and self._model_config.dtype in (torch.float16, torch.bfloat16):
            raise EngineUnavailable(f"{self._spec.model}: its weights do not fit\n{self._memory_advice()}")

    def load(self) -> LoadedModel:
        """Load the weights and generate one token about a blank image, so that what cannot work fails here.

        Raises:
            EngineUnavailable: The weights do not fit, or a library is missing.
            OptionError: LMDeploy does not accept the settings.
            ModelError: LMDeploy cannot run the model.
        """
        with ErrorLogCapture() as errors:
            try:
                pipe = lmdeploy.pipeline(
                    self._checkpoint.path,
                    backend_config=self.config,
                    chat_template_config=self._template.config,
                    trust_remote_code=self._spec.trust_remote_code,
                )
                limit_tiles(self._architecture, pipe.async_engine.vl_encoder.model, self._spec.max_tiles)
                self._match_pixel_dtypes(pipe.async_engine)
                _generate_first_token(pipe)
            except UsageError:
                raise
            except (Exception, SystemExit) as error:  # LMDeploy's checks of its environment call exit()
                raise self._load_error(error, errors) from error
        backend = pipe.async_engine.backend
        if backend != self._backend:
            raise EngineUnavailable(f"LMDeploy runs its engine {backend}, although {self._backend} was requested")
        return LoadedModel(pipe, self._info(pipe), self._chat, self._tokenizer_info)

    def _info(self, pipe: Any) -> EngineInfo:
        engine = pipe.async_engine
        rows = engine.backend_config.max_batch_size
        batch_size = min(
            self._spec.batch_size or BATCH_SIZE, 2 * rows
        )  # more would wait, and --row-timeout counts that
        encoder = getattr(engine, "vl_encoder", None)
        return EngineInfo(
            engine="lmdeploy",
            version=lmdeploy.__version__,
            model=self._spec.model,
            backend=f"{engine.backend} on {cuda.name()}" + (f" x {self.config.tp}" if self.config.tp > 1 else ""),
            revision=self._checkpoint.revision,
            template_sha256=self._template.sha256,
            dtype=str(getattr(encoder, "mm_feature_dtype", None) or self.config.dtype).removeprefix("torch."),
            context=engine.session_len,
            batch_size=batch_size,
            # While it has less than a batch to spare, it still has as many rows as it computes, and some ready.
            rows=rows + max(-(-rows // 4), batch_size),
            notes=tuple(self._notes),
        )

    def _match_pixel_dtypes(self, engine: Any) -> None:
        """Prepare images in the dtype of TurboMind's vision encoder, which otherwise aborts the process.

        LMDeploy takes the images' dtype from the configuration of the whole model, which AWQ models set to float16, but
        the encoder's from its own configuration.
        """
        if engine.backend == "turbomind" and (dtype := loaded_vision_dtype(engine.engine.source_model)) is not None:
            engine.vl_encoder.mm_feature_dtype = dtype
            engine.vl_encoder.model.set_mm_feature_dtype(dtype)
        if self._is_supported_version and engine.vl_encoder.mm_feature_dtype != self._pixel_dtype:
            raise ModelError(
                f"{self._spec.model}: LMDeploy needs pixels in {engine.vl_encoder.mm_feature_dtype}, but they are "
                f"prepared in {self._pixel_dtype}: set one dtype for the whole model with --dtype"
            )

    def _load_error(self, error: BaseException, errors: ErrorLogCapture) -> UsageError:
        """Return the error for a model that failed to load, from the exception and what LMDeploy logged."""
        logged = str(errors) or f"{type(error).__name__}: {first_line(error)}"
        where = f"{self._spec.model}: LMDeploy ({self._backend})"
        if "out of memory" in f"{error} {errors}".lower():
            reason = first_line(error).split(". ")[0]  # torch appends a page about its allocator
            return EngineUnavailable(f"{where} ran out of GPU memory: {reason}\n{self._memory_advice()}")
        if isinstance(error, ImportError):
            return EngineUnavailable(
                f"{where} needs a library that is not installed: {first_line(error)}: pip install 'batchvl[lmdeploy]'"
            )
        if isinstance(error, SystemExit):
            return EngineUnavailable(f"{where} does not start: {logged}")
        if isinstance(error, AssertionError):
            return OptionError(f"{where} does not start: {logged}")
        return ModelError(f"{where} cannot load it: {type(error).__name__}: {first_line(error)}")

    def _describe_memory(self, weights: int) -> str:
        tp = self.config.tp
        each = f" on each of {tp} GPUs" if tp > 1 else ""
        return f"  {cuda.describe_memory()}; the weights take {weights / 2**30:.1f} GiB{each}"

    def _memory_advice(self) -> str:
        config = self.config
        share, length = config.cache_max_entry_count, config.session_len or "the model's"
        return (
            f"{self._memory_report}; the KV cache takes {share:g} of the rest\n"
            f"  to free memory: end other processes on the GPU (nvidia-smi); --cache-max-entry-count below {share:g};\n"
            f"  --session-len below {length}; --engine-option max_batch_size=N below {config.max_batch_size};\n"
            f"  --engine-option max_prefill_token_num=N below {config.max_prefill_token_num}; --quant-policy 8;\n"
            f"  4-bit weights (an AWQ checkpoint); more GPUs (--tp {config.tp * 2})"
        )

    def _note(self, text: str | None) -> None:
        if text is not None:
            self._notes.append(text)


def _require_gpus(tp: int) -> None:
    if not cuda.count():
        raise EngineUnavailable(
            "the engine lmdeploy needs an NVIDIA GPU, and torch finds none (`batchvl doctor` explains why); "
            "--engine transformers also runs on a CPU"
        )
    if tp > cuda.count():
        raise EngineUnavailable(f"--tp {tp}: found {cuda.count()} GPUs")


def _generate_first_token(pipe: Any) -> None:
    blank = {"type": "image_data", "image_data": {"data": Image.new("RGB", (64, 48))}}
    messages = [{"role": "user", "content": [blank, {"type": "text", "text": "?"}]}]
    [answer] = pipe([messages], gen_config=lmdeploy.GenerationConfig(max_new_tokens=1))
    if answer.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"the first request, about a blank image, failed: {answer.error_message}")


class ErrorLogCapture(logging.Handler):
    """Keeps the last errors that LMDeploy logs while it starts, which often say more than its exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: deque[str] = deque(maxlen=3)

    def __enter__(self) -> ErrorLogCapture:
        logging.getLogger("lmdeploy").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("lmdeploy").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record's message on one line."""
        self._lines.append(" ".join(record.getMessage().split()))

    def __str__(self) -> str:
        return "; ".join(self._lines)
