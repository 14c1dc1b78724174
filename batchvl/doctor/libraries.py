"""Check the engines' libraries, and decide which engine `batchvl run` uses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from ..engines.probe import Facts
from ..engines.registry import ENGINE_TYPES, LMDEPLOY, TORCH, TURBOMIND, EngineType, Library, choose_engine
from ..errors import EngineUnavailable
from .finding import Finding, Verdict

TRANSFORMERS_MODEL = "OpenGVLab/InternVL3-1B-hf"
"""A model that the transformers engine supports, unlike the default one."""
PYTORCH_INSTALL = "https://pytorch.org/get-started/locally"


def check_torch(facts: Facts, gpu: bool) -> Finding:
    """Check torch.

    Args:
        facts: The result of its probe.
        gpu: Whether this machine has a GPU that torch should be able to use.
    """
    if problem := _problem(TORCH, facts):
        return problem
    if facts.gpus:
        names = ", ".join(f"{count} x {name}" for name, count in Counter(facts.gpus).items())
        return Finding("ok", "torch", f"{facts.version} for {facts.built_for}, runs on {names.removeprefix('1 x ')}")
    if not gpu:
        build = f" for {facts.built_for}" if facts.built_for else ""
        return Finding("ok", "torch", f"{facts.version}{build}, runs on the CPU")
    if not facts.built_for:
        text = f"{facts.version}, a build without GPU support"
        return Finding("warn", "torch", text, f"install a build for CUDA instead: {PYTORCH_INSTALL}")
    text = f"{facts.version} for {facts.built_for}, cannot use the GPU: {facts.no_gpu}"
    advice = f"update the driver, or install torch for an older CUDA: {PYTORCH_INSTALL}"
    if "memory" in facts.no_gpu:
        advice = "its memory is in use: wait, or select another GPU with CUDA_VISIBLE_DEVICES"
    return Finding("warn", "torch", text, advice)


def check_lmdeploy(facts: Facts, gpu: bool) -> Finding:
    """Check LMDeploy. `gpu`: whether this machine has a GPU that can be used."""
    if not facts.installed and not gpu:
        return Finding("missing", LMDEPLOY.title, "not installed", "not needed here: it requires a GPU")
    if problem := _problem(LMDEPLOY, facts):
        return problem
    return Finding("ok", LMDEPLOY.title, facts.version + ("" if gpu else "; requires a GPU to run"))


def check_turbomind(facts: Facts, lmdeploy: Facts, gpu: bool) -> Finding:
    """Check LMDeploy's native backend, which needs shared libraries of its own."""
    what = TURBOMIND.title
    if not facts.installed:
        return Finding("missing", what, "not installed; it is part of LMDeploy, and its fastest backend")
    if not lmdeploy.usable:
        return Finding("missing", what, "cannot be loaded without LMDeploy")
    if facts.error:
        consequence = "without it, LMDeploy uses its slower PyTorch backend" if gpu else "it requires a GPU"
        command = f"{'; to fix it:' if gpu else '; with one:'}\n  {facts.advice}" if facts.advice else ""
        return Finding("missing", what, facts.error, consequence + command)
    return Finding("ok", what, "the native module loads, with all of its libraries")


def check_library(library: Library, facts: Mapping[str, Facts], gpu: bool) -> Finding:
    """Check a library of the engine registry.

    Args:
        library: The library.
        facts: The results of all probes, by the library's name.
        gpu: Whether this machine has a GPU that can be used.
    """
    if library is TORCH:
        return check_torch(facts[library.name], gpu)
    if library is LMDEPLOY:
        return check_lmdeploy(facts[library.name], gpu)
    if library is TURBOMIND:
        return check_turbomind(facts[library.name], facts[LMDEPLOY.name], gpu)
    found = facts[library.name]
    return _problem(library, found) or Finding("ok", library.title or library.name, found.version)


def verdict(facts: Mapping[str, Facts], shared_memory: Finding) -> Verdict:
    """Return which engine `batchvl run` uses here by default, and what to do if it cannot run."""
    what = "batchvl run"
    if shared_memory.level == "missing":
        return Verdict("missing", what, "cannot run here: images need shared memory", shared_memory.advice)
    runnable = [engine.name for engine in ENGINE_TYPES.values() if engine.automatic and _can_run(engine, facts)]
    workaround = f"until this is fixed:\n  batchvl run --engine {runnable[0]} MANIFEST" if runnable else ""
    try:
        engine = choose_engine("auto")
    except EngineUnavailable as error:
        text, _, advice = str(error).partition("\n")
        return Verdict("warn" if runnable else "missing", what, text, workaround or advice)
    if engine in runnable:
        place = "GPU" if facts["torch"].gpus else "CPU"
        if engine == "lmdeploy":
            backend = "TurboMind" if facts["turbomind"].usable else "its PyTorch backend"
            return Verdict("ok", what, f"uses the engine {engine} on the {place}, with {backend}", engine=engine)
        advice = f"choose a model that it supports: --model {TRANSFORMERS_MODEL}; to see it work:\n  batchvl demo"
        return Verdict("ok", what, f"uses the engine {engine} on the {place}", advice, engine)
    broken = [library.name for library in ENGINE_TYPES[engine].libraries if not facts[library.name].usable]
    reason = f"{' and '.join(broken)} cannot be used" if broken else "torch cannot use a GPU"
    text = f"would use the engine {engine}, but {reason}: see above"
    if runnable:
        return Verdict("warn", what, text, workaround, engine)
    return Verdict("missing", what, text, "fix this, or start with a new environment")


def _can_run(engine: EngineType, facts: Mapping[str, Facts]) -> bool:
    usable = all(facts[library.name].usable for library in engine.libraries)
    return usable and (not engine.needs_gpu or bool(facts["torch"].gpus))


def _problem(library: Library, facts: Facts) -> Finding | None:
    """Return what is wrong with a library, or None."""
    what = library.title or library.name
    install = f"  pip install 'batchvl[{library.extra}]'"
    if not facts.installed:
        return Finding("missing", what, "not installed", install)
    if facts.error:
        text = f"{facts.version and f'{facts.version}: '}{facts.error}"
        if facts.error.endswith("hangs"):
            advice = "if the disk is slow, allow more time:\n  batchvl doctor --timeout 600"
            return Finding("missing", what, text, advice)
        reinstall = f"  pip install --force-reinstall --no-deps '{library.name}{library.versions}'"
        return Finding("missing", what, text, install if facts.error.startswith("ModuleNotFoundError") else reinstall)
    if not _is_within(facts.version, library.versions):
        return Finding("warn", what, f"{facts.version}; batchvl supports {library.versions}", install)
    return None


def _is_within(version: str, bounds: str) -> bool:
    """Return whether a version is within bounds such as ">=0.18,<0.19".

    >>> _is_within("0.18.2", ">=0.18,<0.19"), _is_within("0.19.0rc1", ">=0.18,<0.19"), _is_within("2.13+cpu", ">=2.6")
    (True, False, True)
    """
    release = _release(version)
    matches = [re.fullmatch(r"(>=|<)([\d.]+)", bound.strip()) for bound in bounds.split(",")]
    return all(match and (release >= _release(match[2])) == (match[1] == ">=") for match in matches)


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match[0].split("."))) if match else ()
