"""The GPUs, who uses them, and what to do where there is none."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..hardware.gpus import Gpu, NoAnswer, NoGpu, filter_visible, gpus
from .finding import Finding, Level, size


def graphics(environment: Mapping[str, str] = os.environ) -> tuple[Finding, bool]:
    """The GPUs, and whether there is one that may be used."""
    try:
        found = gpus()
    except NoGpu as error:
        if isinstance(error, NoAnswer):
            advice = "the driver may hang; what the kernel says of it:\n  sudo dmesg | grep -i xid"
            return Finding("warn", "GPU", str(error), advice), True
        if "version mismatch" in str(error):
            advice = "the driver was updated under a running system: restart the machine"
        elif "no NVIDIA driver" in str(error) and Path("/dev/nvidiactl").exists():
            advice = "in a container, to see more:\n  NVIDIA_DRIVER_CAPABILITIES=compute,utility"
            return Finding("warn", "GPU", "nvidia-smi is not there, the driver's devices are", advice), True
        elif "SLURM_JOB_ID" in environment:
            advice = "ask Slurm for one: --gres=gpu:1"
        elif shutil.which("srun"):
            advice = "look on a node that has one:\n  srun --gres=gpu:1 batchvl doctor"
        else:
            advice = "nothing to do for small models: they run on the CPU, slowly"
        return Finding("missing", "GPU", str(error), advice), False
    told = environment.get("CUDA_VISIBLE_DEVICES")
    ours = filter_visible(found, environment)
    of = "" if told is None else f"; CUDA_VISIBLE_DEVICES={told}"
    if not ours:
        text = f"{_models(found)} here, hidden by CUDA_VISIBLE_DEVICES={told!r}"
        return Finding("warn", "GPU", text, "  unset CUDA_VISIBLE_DEVICES"), False
    if len(ours) < len(found):
        of += f" leaves these of {len(found)}"
    level, remarks, advice = _use(ours)
    text = f"{_models(ours)}, driver {ours[0].driver}{_free(ours)}{of}{''.join(f'; {remark}' for remark in remarks)}"
    return Finding(level, "GPU" if len(ours) == 1 else "GPUs", text, advice), True


def _use(ours: Sequence[Gpu]) -> tuple[Level, list[str], str]:
    """Who else is there, and what to do about that."""
    if bare := [gpu for gpu in ours if gpu.mig and not gpu.slices]:
        advice = f"make slices, or turn it off:\n  sudo nvidia-smi -i {bare[0].index} -mig 0"
        return "warn", [f"GPU {bare[0].index}: MIG is on, and no slice of it is here"], advice
    busy = [gpu for gpu in ours if gpu.busy]
    remarks = []
    for gpu in busy[:3]:
        users = ", ".join(gpu.users[:2]) or "processes that cannot be seen from here"
        if len(gpu.users) > 2:
            users += f" and {len(gpu.users) - 2} more"
        lead = f"GPU {gpu.index} has {size(gpu.free)} free, " if len(ours) > 1 else ""
        remarks.append(f"{lead}in use by {users}")
    if len(busy) > 3:
        remarks.append(f"{len(busy) - 3} more are in use")
    idle = [str(gpu.index) for gpu in ours if not gpu.busy]
    if not busy:
        return "ok", remarks, ""
    if idle:
        return "warn", remarks, f"take others:\n  export CUDA_VISIBLE_DEVICES={','.join(idle)}"
    return "warn", remarks, "a model that needs more memory than is free does not load: wait, or end what is there"


def _free(ours: Sequence[Gpu]) -> str:
    """Memory of all that are alike; those in use by others are told apart."""
    idle = [gpu for gpu in ours if not gpu.busy] or list(ours)
    if any(gpu.mig for gpu in ours) or idle[0].free is None:
        slices = ", ".join(f"{count} x {name}" for name, count in Counter(s for g in ours for s in g.slices).items())
        return f", MIG slices {slices}" if slices else ""
    least = min(gpu.free or 0 for gpu in idle)
    return f", {size(least)} of {size(idle[0].total)} free" + (" each" if len(idle) > 1 else "")


def _models(found: Sequence[Gpu]) -> str:
    names = Counter(gpu.name for gpu in found)
    return ", ".join(f"{count} x {name}" if len(found) > 1 else name for name, count in names.items())
