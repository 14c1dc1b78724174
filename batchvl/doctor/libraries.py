"""The engines' libraries, from what their probes found, and which engine runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ..engines import registry
from ..engines.probe import Facts
from ..errors import EngineUnavailable
from .finding import Finding, Verdict

SUPPORTED = {"torch": ">=2.6", "transformers": ">=5", "lmdeploy": ">=0.18,<0.19"}
"""The versions that pyproject.toml asks for."""
NEEDS = {"lmdeploy": ("torch", "lmdeploy"), "transformers": ("torch", "transformers")}
"""The libraries of each engine, the fastest engine first."""
TRANSFORMERS_MODEL = "OpenGVLab/InternVL3-1B-hf"


def torch(facts: Facts, gpu: bool) -> Finding:
    """gpu: whether there is one that torch should see."""
    if wrong := _wrong("torch", "torch", facts, "transformers"):
        return wrong
    if facts.gpus:
        names = ", ".join(f"{count} x {name}" for name, count in Counter(facts.gpus).items())
        found = f"{facts.version} for {facts.built_for}, computes on {names.removeprefix('1 x ')}"
        return Finding("ok", "torch", found)
    if not gpu:
        return Finding("ok", "torch", f"{facts.version}{facts.built_for and ' for '}{facts.built_for}, on the CPU")
    if not facts.built_for:
        found = f"{facts.version}, built for CPUs only"
        advice = "install a build for CUDA in its place: https://pytorch.org/get-started/locally"
    else:
        found = f"{facts.version} for {facts.built_for}, computes on no GPU: {facts.no_gpu}"
        advice = "update the driver, or install a torch for an older CUDA: https://pytorch.org/get-started/locally"
        if "memory" in facts.no_gpu:
            advice = "its memory is taken: wait, or choose another GPU by CUDA_VISIBLE_DEVICES"
    return Finding("warn", "torch", found, advice)


def lmdeploy(facts: Facts, gpu: bool) -> Finding:
    if not facts.installed and not gpu:
        return Finding("missing", "LMDeploy", "not installed", "nothing to do here: it needs a GPU")
    if wrong := _wrong("lmdeploy", "LMDeploy", facts, "lmdeploy"):
        return wrong
    return Finding("ok", "LMDeploy", facts.version + ("" if gpu else "; it needs a GPU to run"))


def turbomind(facts: Facts, lmdeploy: Facts, gpu: bool) -> Finding:
    """The native part of LMDeploy, which has needs of its own."""
    what = "TurboMind"
    if not facts.installed:
        return Finding("missing", what, "comes with LMDeploy, whose fastest backend it is")
    if not lmdeploy.usable:
        return Finding("missing", what, "cannot be loaded without LMDeploy")
    if facts.error:
        why = "until then LMDeploy computes by its slower PyTorch backend" if gpu else "it needs a GPU"
        command = f"{'' if gpu else '; with one:'}\n  {facts.advice}" if facts.advice else ""
        return Finding("missing", what, facts.error, why + command)
    return Finding("ok", what, "its native module loads, with all of its libraries")


def transformers(facts: Facts) -> Finding:
    return _wrong("transformers", "transformers", facts, "transformers") or Finding("ok", "transformers", facts.version)


def verdict(facts: Mapping[str, Facts], shared: Finding) -> Verdict:
    """Which engine `batchvl run` takes here."""
    what = "batchvl run"
    if shared.level == "missing":
        return Verdict("missing", what, "cannot run here: there is no shared memory for pictures", shared.advice)
    can = [name for name in NEEDS if _can(name, facts)]
    instead = f"until that is mended:\n  batchvl run --engine {can[0]} MANIFEST" if can else ""
    try:
        engine = registry.choose("auto")
    except EngineUnavailable as error:
        found, _, advice = str(error).partition("\n")
        return Verdict("warn" if can else "missing", what, found, instead or advice)
    if engine in can:
        advice = f"name a model that it knows: --model {TRANSFORMERS_MODEL}; see it work:\n  batchvl demo"
        place = "GPU" if facts["torch"].gpus else "CPU"
        if engine == "lmdeploy":
            place += ", by TurboMind" if facts["turbomind"].usable else ", by its PyTorch backend"
            advice = ""
        return Verdict("ok", what, f"takes the engine {engine}, on the {place}", advice, engine)
    broken = [library for library in NEEDS.get(engine, ()) if not facts[library].usable]
    why = f"{' and '.join(broken)} cannot be used" if broken else "torch computes on no GPU"
    found = f"would take the engine {engine}, but {why}: see above"
    if can:
        return Verdict("warn", what, found, instead, engine)
    return Verdict("missing", what, found, "mend that, or start with a fresh environment")


def _can(engine: str, facts: Mapping[str, Facts]) -> bool:
    there = all(facts[library].usable for library in NEEDS[engine])
    return there and engine in registry.ENGINES and (engine != "lmdeploy" or bool(facts["torch"].gpus))


def _wrong(library: str, what: str, facts: Facts, extra: str) -> Finding | None:
    """What is wrong with a library, if anything is."""
    install = f"  pip install 'batchvl[{extra}]'"
    if not facts.installed:
        return Finding("missing", what, "not installed", install)
    if facts.error:
        found = f"{facts.version and f'{facts.version}: '}{facts.error}"
        if facts.error.endswith("hangs"):
            return Finding("missing", what, found, "a slow disk? give it longer:\n  batchvl doctor --timeout 600")
        again = f"  pip install --force-reinstall --no-deps '{library}{SUPPORTED[library]}'"
        return Finding("missing", what, found, install if facts.error.startswith("ModuleNotFoundError") else again)
    if not _within(facts.version, SUPPORTED[library]):
        return Finding("warn", what, f"{facts.version}; batchvl is made for {SUPPORTED[library]}", install)
    return None


def _within(version: str, wanted: str) -> bool:
    """Whether a version is within bounds such as ">=0.18,<0.19".

    >>> _within("0.18.2", ">=0.18,<0.19"), _within("0.19.0rc1", ">=0.18,<0.19"), _within("2.13.0+cpu", ">=2.6")
    (True, False, True)
    """
    ours = _numbers(version)
    bounds = [re.fullmatch(r"(>=|<)([\d.]+)", bound.strip()) for bound in wanted.split(",")]
    return all(bound and (ours >= _numbers(bound[2])) == (bound[1] == ">=") for bound in bounds)


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
