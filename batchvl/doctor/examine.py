"""Run all checks in order.

Each check is a function that returns a `Finding`. Libraries are imported in separate processes (`engines/probe.py`),
because a broken one may hang or abort.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .._version import __version__
from ..engines.probe import Facts, Probe
from ..engines.registry import LIBRARIES
from . import gpus, libraries, machine
from .finding import Finding, Verdict

__all__ = ["as_json", "examine"]


def examine(timeout: float, on_progress: Callable[[str], object] = str) -> Iterator[Finding]:
    """Check this machine. Yield each finding as soon as it is known; the last one is a `Verdict`.

    Args:
        timeout: Seconds that importing the libraries may take.
        on_progress: Called with a message before a slow check, and with "" after it.
    """
    yield machine.check_python()
    yield machine.check_cpus()
    gpu, gpu_usable = gpus.check_gpus()
    yield gpu
    yield machine.check_memory()
    yield machine.check_disk()
    yield machine.check_open_files()
    yield (shared_memory := machine.check_shared_memory())
    yield machine.check_slurm()
    on_progress(f"importing {', '.join(LIBRARIES)} ...")
    facts = _probe_libraries(timeout)  # last, because it briefly takes GPU memory
    on_progress("")
    gpu_usable = gpu_usable or bool(facts["torch"].gpus)
    for library in LIBRARIES.values():
        yield libraries.check_library(library, facts, gpu_usable)
    yield libraries.verdict(facts, shared_memory)


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings of `examine` as a JSON object."""
    last = findings[-1]
    return {
        "version": __version__,
        "host": socket.gethostname(),
        "works": last.level != "missing",
        "engine": last.engine if isinstance(last, Verdict) else None,
        "findings": [asdict(finding) for finding in findings],
    }


def _probe_libraries(timeout: float) -> dict[str, Facts]:
    """Import all libraries concurrently, each in its own process."""
    deadline = time.monotonic() + timeout
    probes: list[Probe] = []
    try:
        probes += (Probe(name) for name in LIBRARIES)
        return {probe.name: probe.facts(deadline) for probe in probes}
    finally:
        for probe in probes:
            probe.end()
