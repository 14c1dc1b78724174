"""Which of LMDeploy's engines runs a model, and its configuration."""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterable
from dataclasses import fields
from typing import Any

from ...errors import EngineUnavailable, ModelError, OptionError
from ..base import EngineSpec
from ..checkpoint import first_line
from .chat import INTERNVL
from .libraries import turbomind_problem

VISION_HEAD_SIZES = (64, 128)
"""Sizes of vision heads for which TurboMind has kernels. For any other it aborts the process."""
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 256, 512
"""Defaults for the rows that are computed together; the larger one needs TurboMind and enough memory."""
SHORT_ROW_TOKENS = 1024
"""Tokens of a short row in the KV cache. Long rows are limited by their prompts, not by the batch size."""
MIN_PREFILL_TOKENS, MAX_PREFILL_TOKENS = 2**13, 2**16
"""Prompt tokens that are computed together: LMDeploy's default, and the number up to which speed was seen to grow."""


def choose_backend(
    backend: str, model: str, path: str, model_config: Any, trust_remote_code: bool
) -> tuple[str, str | None]:
    """Choose between LMDeploy's engines.

    Args:
        backend: Value of `--backend`.
        model: The model's name, for messages.
        path: Its directory.
        model_config: Its configuration.
        trust_remote_code: Whether its own code may run.

    Returns:
        "turbomind" or "pytorch", and if `backend` is "auto" a note that says why it is not TurboMind.

    Raises:
        EngineUnavailable: TurboMind was requested and does not load.
        ModelError: TurboMind was requested and does not support the model.
    """
    if backend == "pytorch":
        return "pytorch", None
    if problem := turbomind_problem():
        if backend == "turbomind":
            raise EngineUnavailable(f"--backend turbomind: {problem}; --backend pytorch works without it")
        return "pytorch", f"the backend is pytorch, which is slower, since TurboMind does not load: {problem}"
    reason = _unsupported_reason(path, model_config, trust_remote_code)
    if reason is None and backend == "auto":
        reason = _unsafe_reason(model_config)
    if reason is None:
        return "turbomind", None
    if backend == "turbomind":
        raise ModelError(f"{model}: TurboMind does not support it: {reason}; --backend pytorch may")
    return "pytorch", f"the backend is pytorch, since TurboMind does not support {model}: {reason}"


def _unsupported_reason(path: str, model_config: Any, trust_remote_code: bool) -> str | None:
    """Return why TurboMind does not support a model; None if it does."""
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS, is_supported

    architecture = model_config.architectures[0]
    if not is_supported(path, trust_remote_code=trust_remote_code):
        return f"{architecture} is not a supported architecture"
    if architecture not in INTERNVL:
        return None
    if architecture == "InternVLChatModel" and getattr(model_config, "ps_version", None) != "v2":
        return "an InternVLChatModel must have ps_version v2"
    language = (getattr(language_config(model_config), "architectures", None) or ["without a name"])[0]
    return None if language in SUPPORTED_ARCHS else f"its language model {language} is not a supported architecture"


def _unsafe_reason(model_config: Any) -> str | None:
    """Return why TurboMind would abort on a model that it claims to support; None if it would not."""
    if model_config.architectures[0] not in INTERNVL:
        return None
    vision = model_config.vision_config
    vision = vision if isinstance(vision, dict) else vision.to_dict()
    size = vision["hidden_size"] // vision["num_attention_heads"]
    if size in VISION_HEAD_SIZES:
        return None
    return f"its vision heads have size {size}, and TurboMind supports {' and '.join(map(str, VISION_HEAD_SIZES))}"


def language_config(model_config: Any) -> Any:
    """Return the configuration of a model's language model."""
    return getattr(model_config, "llm_config", None) or getattr(model_config, "text_config", None) or model_config


def engine_config(spec: EngineSpec, backend: str) -> Any:
    """Return LMDeploy's TurbomindEngineConfig or PytorchEngineConfig for a run's options.

    What depends on the GPU's free memory is set later, by `apply_memory_defaults`.

    Raises:
        OptionError: An `--engine-option` does not exist, or a value is invalid.
    """
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
    from lmdeploy.utils import get_max_batch_size
    from pydantic import TypeAdapter, ValidationError

    kind = TurbomindEngineConfig if backend == "turbomind" else PytorchEngineConfig
    flags = {name: value for name, value in spec.flags.items() if name not in ("backend", "chat_template")}
    _check_option_names(spec.options, flags, kind)
    values = {
        "dtype": spec.dtype,
        "enable_metrics": False,  # needs another library, and nobody reads the metrics
        **{name: value for name, value in flags.items() if value is not None},
        **spec.options,
    }
    if backend == "turbomind":
        values.setdefault("enable_prefix_caching", True)  # costs nothing if nothing is shared
    if "max_batch_size" not in values:
        limit = MAX_BATCH_SIZE if backend == "turbomind" else MIN_BATCH_SIZE
        values["max_batch_size"] = min(limit, get_max_batch_size("cuda"))
    try:
        config = TypeAdapter(kind).validate_python(values)
        if config.max_batch_size <= 0:  # LMDeploy would wait forever
            raise ValueError("max_batch_size must be positive")
        return config
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or _settings_named_in(str(first["msg"]), values)
        raise OptionError(f"LMDeploy's {kind.__name__} does not accept {where}: {first['msg']}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise OptionError(f"LMDeploy's {kind.__name__}: {first_line(error)}") from None


def _check_option_names(options: Iterable[str], flags: Container[str], kind: Any) -> None:
    """Raise OptionError if an `--engine-option` has its own flag, or is not a field of LMDeploy's configuration."""
    names = {field.name for field in fields(kind)}
    for name in options:
        if name in flags or name == "dtype":
            raise OptionError(f"--engine-option {name}: use --{name.replace('_', '-')} instead")
        if name not in names:
            close = difflib.get_close_matches(name, names, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"the fields are {', '.join(sorted(names))}"
            raise OptionError(f"--engine-option {name}: LMDeploy's {kind.__name__} has no such field; {hint}")


def _settings_named_in(message: str, values: dict[str, Any]) -> str:
    """Return the settings that a message of LMDeploy's own checks mentions."""
    return ", ".join(f"{name}={value}" for name, value in values.items() if name in message) or "these settings"


def apply_memory_defaults(config: Any, user_set: Container[str], language: Any, free: int) -> None:
    """Set the fields of LMDeploy's TurbomindEngineConfig that depend on the GPU's memory.

    Args:
        config: The configuration to change.
        user_set: Names of fields that the user has set, which are left alone.
        language: The configuration of the model's language model.
        free: Bytes of GPU memory left once the weights are loaded.
    """
    cache = int(free * config.cache_max_entry_count)
    if "max_batch_size" not in user_set:
        config.max_batch_size = min(config.max_batch_size, default_batch_size(language, cache))
    if "max_prefill_token_num" not in user_set:
        config.max_prefill_token_num = default_prefill_tokens(language, free - cache)


def default_batch_size(language: Any, cache: int) -> int:
    """Return how many short rows a KV cache of `cache` bytes holds, between MIN_BATCH_SIZE and MAX_BATCH_SIZE.

    >>> from types import SimpleNamespace
    >>> small = SimpleNamespace(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    >>> large = SimpleNamespace(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    >>> [default_batch_size(small, gib << 30) for gib in (4, 11, 56)]
    [256, 384, 512]
    >>> [default_batch_size(large, gib << 30) for gib in (4, 24, 44)]
    [256, 384, 512]
    """
    heads = getattr(language, "num_attention_heads", 0)
    head_size = getattr(language, "head_dim", None) or getattr(language, "hidden_size", 0) // max(heads, 1)
    kv_heads = getattr(language, "num_key_value_heads", None) or heads
    # Keys and values, 2 bytes each.
    token_bytes = 2 * 2 * getattr(language, "num_hidden_layers", 0) * kv_heads * head_size
    rows = cache // (token_bytes * SHORT_ROW_TOKENS) if token_bytes else 0
    return max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, rows // 128 * 128))


def default_prefill_tokens(language: Any, free: int) -> int:
    """Return the prefill tokens that fit half the memory left after the KV cache, `free` bytes.

    TurboMind encodes an image again for each part of its prompt: 8,192 tokens hold two whole prompts of 3,370.

    >>> from types import SimpleNamespace
    >>> small = SimpleNamespace(hidden_size=1536, intermediate_size=8960)
    >>> large = SimpleNamespace(hidden_size=3584, intermediate_size=18944)
    >>> [default_prefill_tokens(small, mib << 20) for mib in (1638, 4096, 27853)]
    [8192, 32768, 65536]
    >>> [default_prefill_tokens(large, mib << 20) for mib in (1638, 13107, 25395)]
    [8192, 32768, 65536]
    """
    hidden, inner = getattr(language, "hidden_size", 0), getattr(language, "intermediate_size", 0)
    token_bytes = 2 * (6 * hidden + 2 * inner)  # an upper limit: 24 KB were measured where this gives 54 KB
    tokens = MIN_PREFILL_TOKENS
    while token_bytes and tokens < MAX_PREFILL_TOKENS and 2 * tokens * token_bytes <= free // 2:
        tokens *= 2
    return tokens
