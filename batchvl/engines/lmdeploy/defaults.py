"""What the GPU's memory and the model make of the settings that TurboMind's speed depends on, unless a user does.

docs/performance.md has what was measured; the PyTorch engine is no faster with more of either.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

LEAST_ROWS, MOST_ROWS = 256, 512
"""Rows computed at once."""
ROW_TOKENS = 1024
"""Of a short row in the k/v cache. What limits long ones is their prompts, and not how many are computed at once."""
LEAST_PREFILL, MOST_PREFILL = 2**13, 2**16
"""Tokens of prompts computed at once: LMDeploy's own number, and the one up to which speed was seen to grow."""


def fill_in(config: Any, told: Container[str], language: Any, free: int) -> None:
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
