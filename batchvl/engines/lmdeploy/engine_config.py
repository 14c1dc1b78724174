"""Which of LMDeploy's engines runs, and how it is configured."""

from __future__ import annotations

import difflib
from collections.abc import Container
from dataclasses import fields
from typing import Any

from ...errors import EngineUnavailable, ModelError, OptionError
from ..base import EngineSpec
from ..checkpoint import first_line
from .chat import INTERNVL
from .libraries import turbomind_problem

KNOWN_HEADS = (64, 128)
"""Sizes of vision heads that TurboMind has kernels for. Of another it aborts the process."""


def choose_backend(wanted: str, model: str, path: str, config: Any, trust_remote_code: bool) -> tuple[str, str | None]:
    """ "turbomind" or "pytorch", and for "auto" a note why it is not TurboMind.

    config: the model's. Raises EngineUnavailable where TurboMind was asked for and does not load, ModelError where it
    does not serve the model.
    """
    if wanted == "pytorch":
        return "pytorch", None
    if missing := turbomind_problem():
        if wanted == "turbomind":
            raise EngineUnavailable(f"--backend turbomind: {missing}; --backend pytorch does without")
        return "pytorch", f"the backend is pytorch, slower than TurboMind, which does not load here: {missing}"
    why = _not_served(path, config, trust_remote_code)
    if why is None and wanted == "auto":
        why = _not_safe(config)
    if why is None:
        return "turbomind", None
    if wanted == "turbomind":
        raise ModelError(f"{model}: TurboMind does not serve it: {why}; --backend pytorch may")
    return "pytorch", f"the backend is pytorch, since TurboMind does not serve {model}: {why}"


def _not_served(path: str, config: Any, trust_remote_code: bool) -> str | None:
    from lmdeploy.turbomind.supported_models import SUPPORTED_ARCHS, is_supported

    architecture = config.architectures[0]
    if not is_supported(path, trust_remote_code=trust_remote_code):
        return f"it knows no {architecture}"
    if architecture not in INTERNVL:
        return None
    if architecture == "InternVLChatModel" and getattr(config, "ps_version", None) != "v2":
        return "it wants an InternVLChatModel of ps_version v2"
    inner = (getattr(text_config(config), "architectures", None) or ["nothing"])[0]
    return None if inner in SUPPORTED_ARCHS else f"of its language half, {inner}, it knows nothing"


def _not_safe(config: Any) -> str | None:
    if config.architectures[0] not in INTERNVL:
        return None
    vision = config.vision_config
    vision = vision if isinstance(vision, dict) else vision.to_dict()
    size = vision["hidden_size"] // vision["num_attention_heads"]
    return None if size in KNOWN_HEADS else f"its vision heads have {size} numbers, and not {KNOWN_HEADS[0]} or 128"


def text_config(config: Any) -> Any:
    """The language half's part of a model's configuration."""
    return getattr(config, "llm_config", None) or getattr(config, "text_config", None) or config


def engine_config(spec: EngineSpec, backend: str) -> Any:
    """LMDeploy's TurbomindEngineConfig or PytorchEngineConfig of the run's options, as far as they go without the GPU's
    memory being looked at: see `defaults.py`.

    Raises OptionError for an --engine-option that there is none of, or a value that it cannot have.
    """
    from lmdeploy import PytorchEngineConfig, TurbomindEngineConfig
    from lmdeploy.utils import get_max_batch_size
    from pydantic import TypeAdapter, ValidationError

    kind = TurbomindEngineConfig if backend == "turbomind" else PytorchEngineConfig
    names = {field.name for field in fields(kind)}
    flags = {name: value for name, value in spec.flags.items() if name not in ("backend", "chat_template")}
    for name in spec.options:
        if name in flags or name == "dtype":
            raise OptionError(f"--engine-option {name}: give it as --{name.replace('_', '-')}")
        if name not in names:
            close = difflib.get_close_matches(name, names, 3)
            hint = f"; did you mean {' or '.join(close)}?" if close else f"; it knows {', '.join(sorted(names))}"
            raise OptionError(f"--engine-option {name}: is no field of LMDeploy's {kind.__name__}{hint}")
    values = {
        "dtype": spec.dtype,
        "enable_metrics": False,  # wants a library of its own, and counts what nobody reads
        **{name: value for name, value in flags.items() if value is not None},
        **spec.options,
    }
    most = LEAST_ROWS
    if backend == "turbomind":
        most = MOST_ROWS
        values.setdefault("enable_prefix_caching", True)  # costs nothing where nothing is shared
    if "max_batch_size" not in values:
        values["max_batch_size"] = min(most, get_max_batch_size("cuda"))
    try:
        config = TypeAdapter(kind).validate_python(values)
        assert config.max_batch_size > 0, "max_batch_size must be positive"  # with none it would wait for ever
        return config
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or _named(str(found["msg"]), values)
        raise OptionError(f"LMDeploy's {kind.__name__} refuses {where}: {found['msg']}") from None
    except (AssertionError, TypeError, ValueError) as error:
        raise OptionError(f"LMDeploy's {kind.__name__}: {first_line(error)}") from None


def _named(message: str, values: dict[str, Any]) -> str:
    """The settings that a message of LMDeploy's own checks speaks of."""
    return ", ".join(f"{name}={value}" for name, value in values.items() if name in message) or "these settings"


LEAST_ROWS, MOST_ROWS = 256, 512
"""Rows computed at once."""
ROW_TOKENS = 1024
"""Of a short row in the k/v cache. What limits long ones is their prompts, and not how many are computed at once."""
LEAST_PREFILL, MOST_PREFILL = 2**13, 2**16
"""Tokens of prompts computed at once: LMDeploy's own number, and the one up to which speed was seen to grow."""


def apply_memory_defaults(config: Any, told: Container[str], language: Any, free: int) -> None:
    """Sets what was not `told` in LMDeploy's TurbomindEngineConfig.

    language: the configuration of the model's language half. free: bytes of GPU memory, once the weights are loaded.
    """
    cache = int(free * config.cache_max_entry_count)
    if "max_batch_size" not in told:
        config.max_batch_size = min(config.max_batch_size, rows(language, cache))
    if "max_prefill_token_num" not in told:
        config.max_prefill_token_num = prefill_tokens(language, free - cache)


def rows(language: Any, cache: int) -> int:
    """As many as a k/v cache of so many bytes holds with short prompts, up to MOST_ROWS, and no fewer than LEAST_ROWS.

    >>> from types import SimpleNamespace
    >>> small = SimpleNamespace(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2)
    >>> large = SimpleNamespace(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    >>> [rows(small, gib << 30) for gib in (4, 11, 56)], [rows(large, gib << 30) for gib in (4, 24, 44)]
    ([256, 384, 512], [256, 384, 512])
    """
    heads = getattr(language, "num_attention_heads", 0)
    size = getattr(language, "head_dim", None) or getattr(language, "hidden_size", 0) // max(heads, 1)
    kept = getattr(language, "num_key_value_heads", None) or heads
    token = 2 * 2 * getattr(language, "num_hidden_layers", 0) * kept * size  # keys and values of 16 bits
    fitting = cache // (token * ROW_TOKENS) if token else 0
    return max(LEAST_ROWS, min(MOST_ROWS, fitting // 128 * 128))


def prefill_tokens(language: Any, left: int) -> int:
    """As many as half of the memory is enough for that the k/v cache leaves.

    TurboMind encodes a picture anew for each part of its prompt: of prompts of 3,370 tokens two fit into 8,192 whole.

    >>> from types import SimpleNamespace
    >>> small = SimpleNamespace(hidden_size=1536, intermediate_size=8960)
    >>> large = SimpleNamespace(hidden_size=3584, intermediate_size=18944)
    >>> [prefill_tokens(small, mib << 20) for mib in (1638, 4096, 27853)]
    [8192, 32768, 65536]
    >>> [prefill_tokens(large, mib << 20) for mib in (1638, 13107, 25395)]
    [8192, 32768, 65536]
    """
    hidden, inner = getattr(language, "hidden_size", 0), getattr(language, "intermediate_size", 0)
    token = 2 * (6 * hidden + 2 * inner)  # 16 bits each; measured were 24 KB where this gives 54
    most = LEAST_PREFILL
    while token and most < MOST_PREFILL and 2 * most * token <= left // 2:
        most *= 2
    return most
