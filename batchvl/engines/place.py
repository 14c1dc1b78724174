"""Where replicas of the engine run: which GPUs each of them sees, found without the libraries that could use them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import OptionError
from ..options import RunOptions

_DEV = Path("/dev")


class Place(NamedTuple):
    """GPUs for a replica, by their numbers as CUDA counts them here, and what its environment is to say of them."""

    gpus: tuple[int, ...] = ()
    environment: Mapping[str, str] = {}

    @property
    def tag(self) -> str:
        """For the names of files: "gpu1", "gpu2-3"."""
        return "gpu" + "-".join(map(str, self.gpus))

    def __str__(self) -> str:
        return f"GPU{'s' * (len(self.gpus) > 1)} {', '.join(map(str, self.gpus))}"


def visible(environment: Mapping[str, str] = os.environ, dev: Path = _DEV) -> list[str]:
    """The NVIDIA GPUs that CUDA would find, as CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs where it has some."""
    # In Windows' subsystem for Linux one device stands for them all.
    count = len(list(dev.glob("nvidia[0-9]*"))) or int((dev / "dxg").exists())
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(number) for number in range(count)]
    names: list[str] = []
    for name in map(str.strip, told.split(",")):
        if not count or not (int(name) < count if name.isdigit() else name.startswith(("GPU-", "MIG-"))):
            break  # as for CUDA, a name that means no GPU ends the list
        names.append(name)
    return names


def places(options: RunOptions, environment: Mapping[str, str] = os.environ, dev: Path = _DEV) -> list[Place]:
    """One for each replica that `--gpus` asks for. Raises OptionError where that cannot be.

    A lone replica's place says nothing: its engine sees what there is, and chooses.
    """
    engine, tp = options.engine, options.lmdeploy.tp
    if engine.gpus == 1:
        return [Place()]
    asked = f"--gpus {engine.gpus}"
    if engine.device not in ("auto", "cuda"):
        raise OptionError(
            f"{asked}: --device {engine.device} names one device; leave it out, and each GPU has an engine"
        )
    names = visible(environment, dev)
    if engine.engine == "fake":  # which needs none
        return [Place((number,)) for number in range(engine.gpus or max(1, len(names)))]
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if len(names) < max(engine.gpus, tp):
        found = {0: "no NVIDIA GPU", 1: "1 GPU"}.get(len(names), f"{len(names)} GPUs")
        raise OptionError(f"{asked}: found {found} here" + ("" if told is None else f" (CUDA_VISIBLE_DEVICES={told})"))
    if engine.gpus % tp:
        raise OptionError(f"{asked}: is no multiple of --tp {tp}, the GPUs of each engine")
    groups = [tuple(range(at, at + tp)) for at in range(0, (engine.gpus or len(names)) - tp + 1, tp)]
    if len(groups) == 1:
        return [Place()]
    return [Place(group, {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in group)}) for group in groups]
