"""Offline batch inference of vision-language models: the GPU never waits, nothing is lost, one command.

import batchvl

summary = batchvl.run("manifest.parquet", model="shapes")
print(summary.ok, "answers in", summary.results)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0.dev0"

__all__ = ["BatchvlError", "FakeEngine", "Summary", "__version__", "merge", "retry", "run", "status", "validate"]

if TYPE_CHECKING:
    from .engines.fake import FakeEngine
    from .errors import BatchvlError
    from .results import merge, status
    from .runner.job import run
    from .runner.retry import retry
    from .runner.summary import Summary
    from .validation import validate

_HOMES = {
    "BatchvlError": "errors",
    "FakeEngine": "engines.fake",
    "Summary": "runner.summary",
    "merge": "results",
    "retry": "runner.retry",
    "run": "runner.job",
    "status": "results",
    "validate": "validation",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `batchvl --help` needs neither pyarrow nor aiohttp.
    if name not in _HOMES:
        raise AttributeError(f"module 'batchvl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
