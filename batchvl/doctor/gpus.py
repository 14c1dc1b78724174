"""Check the GPUs: which can be used, who else uses them, and what to do if there is none."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..hardware.gpus import VISIBLE_DEVICES, DriverHangs, Gpu, NoGpu, filter_visible, list_gpus
from .finding import Finding, Level, format_size

MAX_BUSY = 3
"""GPUs in use that are listed one by one."""
MAX_USERS = 2
"""Processes of a GPU that are listed."""


def check_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Finding, bool]:
    """Return the finding about the GPUs, and whether one can be used."""
    try:
        gpus = list_gpus()
    except NoGpu as error:
        return _no_gpu(error, environment)
    variable = environment.get(VISIBLE_DEVICES)
    visible = filter_visible(gpus, environment)
    selection = "" if variable is None else f"; {VISIBLE_DEVICES}={variable}"
    if not visible:
        text = f"{_models(gpus)}, hidden by {VISIBLE_DEVICES}={variable!r}"
        return Finding("warn", "GPU", text, f"  unset {VISIBLE_DEVICES}"), False
    if len(visible) < len(gpus):
        selection += f" selects {len(visible)} of {len(gpus)}"
    level, remarks, advice = _usage(visible)
    parts = [f"{_models(visible)}, driver {visible[0].driver}{_free_memory(visible)}{selection}", *remarks]
    return Finding(level, "GPU" if len(visible) == 1 else "GPUs", "; ".join(parts), advice), True


def _no_gpu(error: NoGpu, environment: Mapping[str, str]) -> tuple[Finding, bool]:
    """Return the finding if no GPU was found, and whether there may be one all the same."""
    if isinstance(error, DriverHangs):
        advice = "the driver may hang; look at the kernel's log:\n  sudo dmesg | grep -i xid"
        return Finding("warn", "GPU", str(error), advice), True
    if "version mismatch" in str(error):
        advice = "the driver was updated while the system was running: restart the machine"
    elif "no NVIDIA driver" in str(error) and Path("/dev/nvidiactl").exists():
        text = "NVML (libnvidia-ml.so.1) is not installed, but the driver's device files exist"
        advice = "in a container, for more details, set:\n  NVIDIA_DRIVER_CAPABILITIES=compute,utility"
        return Finding("warn", "GPU", text, advice), True
    elif "SLURM_JOB_ID" in environment:
        advice = "request one from Slurm: --gres=gpu:1"
    elif shutil.which("srun"):
        advice = "try a node that has one:\n  srun --gres=gpu:1 batchvl doctor"
    else:
        advice = "not needed for small models, which also run on the CPU, slowly"
    return Finding("missing", "GPU", str(error), advice), False


def _usage(gpus: Sequence[Gpu]) -> tuple[Level, list[str], str]:
    """Return the level, remarks on the use of GPUs by others, and advice."""
    if unsliced := [gpu for gpu in gpus if gpu.mig and not gpu.slices]:
        index = unsliced[0].index
        advice = f"create MIG instances, or disable MIG:\n  sudo nvidia-smi -i {index} -mig 0"
        return "warn", [f"GPU {index}: MIG is enabled, but no MIG instance is available here"], advice
    busy = [gpu for gpu in gpus if gpu.busy]
    if not busy:
        return "ok", [], ""
    remarks = []
    for gpu in busy[:MAX_BUSY]:
        users = ", ".join(gpu.users[:MAX_USERS]) or "processes that are not visible from here"
        if len(gpu.users) > MAX_USERS:
            users += f" and {len(gpu.users) - MAX_USERS} more"
        lead = f"GPU {gpu.index} has {format_size(gpu.free)} free, " if len(gpus) > 1 else ""
        remarks.append(f"{lead}in use by {users}")
    if len(busy) > MAX_BUSY:
        remarks.append(f"{len(busy) - MAX_BUSY} more in use")
    if idle := [str(gpu.index) for gpu in gpus if not gpu.busy]:
        return "warn", remarks, f"use only the idle ones:\n  export {VISIBLE_DEVICES}={','.join(idle)}"
    return "warn", remarks, "a model that does not fit into the free memory fails to load: wait, or end those processes"


def _free_memory(gpus: Sequence[Gpu]) -> str:
    """Return the free memory of the idle GPUs, or of all if none is idle, for the finding's text."""
    idle = [gpu for gpu in gpus if not gpu.busy] or list(gpus)
    if any(gpu.mig for gpu in gpus) or idle[0].free is None:
        profiles = Counter(profile for gpu in gpus for profile in gpu.slices)
        slices = ", ".join(f"{count} x {profile}" for profile, count in profiles.items())
        return f", MIG instances {slices}" if slices else ""
    least = min(gpu.free or 0 for gpu in idle)
    return f", {format_size(least)} of {format_size(idle[0].total)} free" + (" each" if len(idle) > 1 else "")


def _models(gpus: Sequence[Gpu]) -> str:
    names = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{count} x {name}" if len(gpus) > 1 else name for name, count in names.items())
