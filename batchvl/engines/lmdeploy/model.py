"""From a model's name to a pipeline that answers: first what it is, then its weights."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections import deque
from pathlib import Path
from typing import Any

import lmdeploy
import torch
from lmdeploy.archs import check_vl_llm, get_model_arch
from PIL import Image
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ...errors import EngineUnavailable, ModelError, OptionError, UsageError
from ...hardware.limits import memory
from ...images.preparation import PreparationSpec
from .. import cuda as gpu
from ..base import EngineInfo, EngineSpec
from ..checkpoint import Checkpoint, find, first_line
from .chat import Chat, limit_tiles, picture_settings
from .dtypes import pixel_type, prepared_elsewhere, vision_type
from .engine_config import apply_memory_defaults, choose_backend, engine_config, text_config
from .precomputed import PrecomputedPromptProcessor
from .sampling import TokenizerInfo
from .streaming import disable_streaming
from .template import Template
from .tile_budget import TileBudget

SERIES = "0.18."
"""The LMDeploy that all here was read and measured with."""
LIST = 32
PREPARING = 8
"""Rows whose pictures are being made tiles of: LMDeploy does that one by one, and the rest wait as they came."""


class LoadedModel:
    """A pipeline that answers. `preparing`, `room` and `steps` are for its own loop."""

    def __init__(self, pipe: Any, info: EngineInfo, chat: Chat, words: TokenizerInfo) -> None:
        self.pipe, self.info, self.chat, self.words = pipe, info, chat, words
        self.engine, self.sessions, self.loop = pipe.async_engine, pipe.session_mgr, pipe.internal_thread.loop
        self.stop_ids: list[int] = self.engine.stop_words or []
        self.keeps_prefixes = self.engine.backend == "turbomind" and self.engine.backend_config.enable_prefix_caching
        self.engine.prompt_processor = PrecomputedPromptProcessor(self.engine.prompt_processor)
        disable_streaming(self.sessions)
        self.preparing = asyncio.Semaphore(PREPARING)
        self.room = TileBudget(max(memory() // 8, 2**30))
        self.steps = 0


class ResolvedModel:
    """A model's files, its template, and which of LMDeploy's engines is going to run it; its weights are not loaded.

    Raises a UsageError for a model that is not found or not served, a GPU or a library that is missing, and settings
    that cannot be.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._notes: list[str] = []
        self._known = lmdeploy.__version__.startswith(SERIES)
        if not self._known:
            self._note(f"LMDeploy {lmdeploy.__version__}: batchvl was made with and for {SERIES}x")
        tp = spec.flags["tp"]
        if not gpu.count():
            raise EngineUnavailable(
                "the engine lmdeploy needs an NVIDIA GPU, and torch finds none here (`batchvl doctor` says more); "
                "--engine transformers runs on a CPU"
            )
        if tp > gpu.count():
            raise EngineUnavailable(f"--tp {tp}: found {gpu.count()} GPUs here")
        self._checkpoint = find(spec.model, spec.revision, spec.trust_remote_code)
        path, trust = self._checkpoint.path, spec.trust_remote_code
        self._hf_config = configuration(self._checkpoint, spec.model, trust)
        architecture = self._hf_config.architectures[0]
        self._backend, note = choose_backend(spec.flags["backend"], spec.model, path, self._hf_config, trust)
        self._note(note)
        if not check_vl_llm(self._backend, self._hf_config.to_dict()):
            raise ModelError(
                f"{spec.model}: LMDeploy serves {architecture} not as a model for pictures; --engine transformers may"
            )
        self.config = engine_config(spec, self._backend)
        """LMDeploy's, of its engine; whole once `wait` has returned."""
        own = getattr(text_config(self._hf_config), "max_position_embeddings", None)
        if own and (self.config.session_len or 0) > own:
            self._note(f"--session-len {self.config.session_len}: the model was made for {own} tokens")
        self._template = Template(path, spec.flags["chat_template"], trust)
        self._note(self._template.note)
        self._chat = Chat(architecture, picture_settings(architecture, spec.max_tiles))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        self._words = TokenizerInfo(tokenizer, int(text_config(self._hf_config).vocab_size))
        self._pixels = pixel_type(self._hf_config, self.config) if self._known else None
        self.preparation_spec = self._preparation()

    @property
    def wants_main_thread(self) -> bool:
        """Whether `load` is for the main thread: LMDeploy's executor of several processes asks for signals there."""
        return self._backend == "pytorch" and self.config.tp > 1

    def _preparation(self) -> PreparationSpec:
        """What image workers do: all that LMDeploy does before its engine, where that is known to be the same."""
        special = tuple(self._words.special)
        architecture = self._hf_config.architectures[0]
        if not (self._known and prepared_elsewhere(self._hf_config, self._backend)):
            self._note(f"LMDeploy prepares the pictures for {architecture} itself, one by one: the GPU may wait for it")
            return PreparationSpec("batchvl.engines.lmdeploy.raw_images:Pictures", special_tokens=special)
        options = {
            "model": self._checkpoint.path,
            "architecture": architecture,
            "trust_remote_code": self._spec.trust_remote_code,
            "dtype": self._pixels and str(self._pixels).removeprefix("torch."),
            "template": self._template.fields,
            "max_tiles": self._spec.max_tiles,
            "draft_decode": self._spec.draft_decode,
            "fingerprints": self._backend == "turbomind",
        }
        return PreparationSpec("batchvl.engines.lmdeploy.preparation:Preparation", options, special_tokens=special)

    def wait(self) -> None:
        """Waits for the GPU's memory, telling `say`. Raises EngineUnavailable where the weights do not fit."""
        weights = self._checkpoint.weight_bytes // self._spec.flags["tp"]
        gpu.wait_for_memory(0, weights)
        if self._backend == "turbomind":
            free = gpu.memory()[0] - weights
            apply_memory_defaults(self.config, self._spec.options, text_config(self._hf_config), free)
        self._before = self._memory(weights)
        # Into the log, for the last words: TurboMind ends the process where memory is too little.
        print(self._before, file=sys.stderr, flush=True)
        if gpu.memory()[0] < weights and self._hf_config.dtype in (torch.float16, torch.bfloat16):
            raise EngineUnavailable(f"{self._spec.model}: its weights do not fit\n{self._before}{self._advice()}")

    def load(self) -> LoadedModel:
        """Loads the weights, once there is room for them, and asks for one token about a blank picture, so that what
        cannot work fails here.

        Raises EngineUnavailable where they do not fit or something is missing, ModelError where LMDeploy fails over
        the model.
        """
        with ErrorLogCapture() as complaints:
            try:
                pipe = lmdeploy.pipeline(
                    self._checkpoint.path,
                    backend_config=self.config,
                    chat_template_config=self._template.config,
                    trust_remote_code=self._spec.trust_remote_code,
                )
                model = pipe.async_engine.vl_encoder.model
                limit_tiles(self._hf_config.architectures[0], model, self._spec.max_tiles)
                self._match_pixels(pipe.async_engine)
                self._try(pipe)
            except UsageError:
                raise
            except (Exception, SystemExit) as error:  # LMDeploy's checks of its surroundings call exit()
                raise self._refusal(error, complaints) from error
        backend = pipe.async_engine.backend
        if backend != self._backend:
            raise EngineUnavailable(f"LMDeploy runs its engine {backend} although {self._backend} was asked for")
        return LoadedModel(pipe, self._info(pipe), self._chat, self._words)

    def _info(self, pipe: Any) -> EngineInfo:
        engine = pipe.async_engine
        rows = engine.backend_config.max_batch_size
        size = min(self._spec.batch_size or LIST, 2 * rows)  # more would only wait, on the clock of --row-timeout
        encoder = getattr(engine, "vl_encoder", None)
        return EngineInfo(
            engine="lmdeploy",
            version=lmdeploy.__version__,
            model=self._spec.model,
            backend=f"{engine.backend} on {gpu.name()}" + (f" x {self.config.tp}" if self.config.tp > 1 else ""),
            revision=self._checkpoint.revision,
            template_sha256=self._template.sha256,
            dtype=str(getattr(encoder, "mm_feature_dtype", None) or self.config.dtype).removeprefix("torch."),
            context=engine.session_len,
            batch_size=size,
            rows=rows + max(-(-rows // 4), size),  # so that, with no room for another list, it has all that it computes
            notes=tuple(self._notes),
        )

    def _try(self, pipe: Any) -> None:
        blank = {"type": "image_data", "image_data": {"data": Image.new("RGB", (64, 48))}}
        ask = [{"role": "user", "content": [blank, {"type": "text", "text": "?"}]}]
        [answer] = pipe([ask], gen_config=lmdeploy.GenerationConfig(max_new_tokens=1))
        if answer.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a first question about a blank picture failed: {answer.error_message}")

    def _match_pixels(self, engine: Any) -> None:
        """Has pictures prepared in the type that TurboMind's vision half has loaded, or it aborts the process: LMDeploy
        takes the one from the whole model's configuration, as AWQ's has float16, and the other from the vision half's.
        """
        if engine.backend == "turbomind" and (loaded := vision_type(engine.engine.source_model)) is not None:
            engine.vl_encoder.mm_feature_dtype = loaded
            engine.vl_encoder.model.set_mm_feature_dtype(loaded)
        if self._known and engine.vl_encoder.mm_feature_dtype != self._pixels:
            raise ModelError(
                f"{self._spec.model}: LMDeploy wants its pixels as {engine.vl_encoder.mm_feature_dtype}, and they are "
                f"prepared as {self._pixels}: name one type for all of the model with --dtype"
            )

    def _refusal(self, error: BaseException, complaints: ErrorLogCapture) -> UsageError:
        said = str(complaints) or f"{type(error).__name__}: {first_line(error)}"
        where = f"{self._spec.model}: LMDeploy ({self._backend})"
        if "out of memory" in f"{error} {complaints}".lower():
            said = first_line(error).split(". ")[0]  # torch goes on with a page about its allocator
            return EngineUnavailable(f"{where} found too little GPU memory: {said}\n{self._before}{self._advice()}")
        if isinstance(error, ImportError):
            return EngineUnavailable(f"{where} misses a library: {first_line(error)}: pip install 'batchvl[lmdeploy]'")
        if isinstance(error, SystemExit):
            return EngineUnavailable(f"{where} does not start: {said}")
        if isinstance(error, AssertionError):
            return OptionError(f"{where} does not start: {said}")
        return ModelError(f"{where} cannot load it: {type(error).__name__}: {first_line(error)}")

    def _memory(self, weights: int) -> str:
        tp = self.config.tp
        each = f" for each of {tp} GPUs" if tp > 1 else ""
        return f"  {gpu.describe_memory()}, of its files' weights {weights / 2**30:.1f} GiB{each}"

    def _advice(self) -> str:
        config = self.config
        share, length = config.cache_max_entry_count, config.session_len or "the model's"
        return (
            f"; the k/v cache takes {share:g} of what is left\n"
            f"  what helps: end what else uses the GPU (nvidia-smi); --cache-max-entry-count below {share:g};\n"
            f"  --session-len below {length}; --engine-option max_batch_size=N below {config.max_batch_size};\n"
            f"  --engine-option max_prefill_token_num=N below {config.max_prefill_token_num}; --quant-policy 8;\n"
            f"  weights of 4 bits (an AWQ checkpoint); more GPUs (--tp {config.tp * 2})"
        )

    def _note(self, text: str | None) -> None:
        if text is not None:
            self._notes.append(text)


class ErrorLogCapture(logging.Handler):
    """The last errors that LMDeploy wrote to its log while it started: its exceptions often say less."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: deque[str] = deque(maxlen=3)

    def __enter__(self) -> ErrorLogCapture:
        logging.getLogger("lmdeploy").addHandler(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("lmdeploy").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(" ".join(record.getMessage().split()))

    def __str__(self) -> str:
        return "; ".join(self._lines)


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
