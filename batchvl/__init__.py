"""Offline batch inference of vision-language models.

import batchvl

summary = batchvl.run("manifest.parquet", model="shapes")
print(summary.ok, "answers in", summary.results)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

__all__ = [
    "BatchvlError",
    "FakeEngine",
    "FetchSummary",
    "Summary",
    "__version__",
    "fetch",
    "merge",
    "retry",
    "run",
    "status",
    "validate",
]

if TYPE_CHECKING:
    from .engines.fake import FakeEngine
    from .errors import BatchvlError
    from .results import merge, status
    from .runner.fetch import fetch
    from .runner.job import run
    from .runner.retry import retry
    from .runner.summary import FetchSummary, Summary
    from .validation import validate

_MODULES = {
    "BatchvlError": "errors",
    "FakeEngine": "engines.fake",
    "FetchSummary": "runner.summary",
    "Summary": "runner.summary",
    "fetch": "runner.fetch",
    "merge": "results",
    "retry": "runner.retry",
    "run": "runner.job",
    "status": "results",
    "validate": "validation",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `batchvl --help` imports neither pyarrow nor aiohttp.
    if name not in _MODULES:
        raise AttributeError(f"module 'batchvl' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
