"""What works on this machine, and what to do about each thing that does not: `batchvl doctor`.

Every check is a function to one `Finding`. Libraries are imported in processes of their own (`engines/probe.py`), since
one that is broken may hang or take its process along.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from .._version import __version__
from ..engines.probe import PROBES, Facts, Probe
from . import gpus, libraries, machine
from .finding import Finding, Verdict

__all__ = ["Finding", "Verdict", "as_json", "examine"]


def examine(seconds: float, say: Callable[[str], object] = str) -> Iterator[Finding]:
    """Each finding as it is made; the last one is a `Verdict`.

    seconds: for importing the libraries. say: is told what takes long, and "" when it is over.
    """
    yield machine.python()
    yield machine.processors()
    gpu, usable = gpus.graphics()
    yield gpu
    yield machine.memory()
    yield machine.disk()
    yield machine.open_files()
    yield (shared := machine.shared_memory())
    yield machine.slurm()
    say(f"importing {', '.join(PROBES)} ...")
    facts = _probe(seconds)  # last, since it takes memory of the GPU for a moment
    say("")
    usable = usable or bool(facts["torch"].gpus)
    yield libraries.torch(facts["torch"], usable)
    yield libraries.lmdeploy(facts["lmdeploy"], usable)
    yield libraries.turbomind(facts["turbomind"], facts["lmdeploy"], usable)
    yield libraries.transformers(facts["transformers"])
    yield libraries.verdict(facts, shared)


def _probe(seconds: float) -> dict[str, Facts]:
    """All libraries at once, each in its own process."""
    until = time.monotonic() + seconds
    probes: list[Probe] = []
    try:
        probes += (Probe(name) for name in PROBES)
        return {probe.name: probe.facts(until) for probe in probes}
    finally:
        for probe in probes:
            probe.end()


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """All that `examine` found as one object."""
    last = findings[-1]
    return {
        "version": __version__,
        "host": socket.gethostname(),
        "works": last.level != "missing",
        "engine": last.engine if isinstance(last, Verdict) else None,
        "findings": [asdict(finding) for finding in findings],
    }
