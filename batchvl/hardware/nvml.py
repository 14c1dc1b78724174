"""Ask NVIDIA's driver for its GPUs: `python -P nvml.py` prints them as one line of JSON.

`hardware/gpus.py` runs this file in a process of its own, because a call into a broken driver may never return. It
therefore imports nothing of batchvl.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")
MIG_ENABLED = 1


def query() -> dict[str, Any]:
    """Return {"gpus": […]}, each with the fields of `gpus.Gpu`, or {"error": "…"}."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return {"error": "no NVIDIA driver: libnvidia-ml.so.1 is not installed"}
    except pynvml.NVMLError as error:
        return {"error": f"the NVIDIA driver cannot be used: {error}"}
    gpus, errors = [], []
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            gpus.append(describe(index))
        except pynvml.NVMLError as error:  # such as a GPU that has fallen off the bus
            errors.append(f"GPU {index} cannot be used: {error}")
    return {"gpus": gpus} if gpus else {"error": "; ".join(errors) or "the NVIDIA driver found no GPU"}


def describe(index: int) -> dict[str, Any]:
    """Return the fields of one GPU. Those that its driver does not support are None or empty."""
    device = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = optional(lambda: pynvml.nvmlDeviceGetMemoryInfo(device))
    mode = optional(lambda: pynvml.nvmlDeviceGetMigMode(device))
    mig = mode is not None and mode[0] == MIG_ENABLED
    return {
        "index": index,
        "uuid": pynvml.nvmlDeviceGetUUID(device),
        "name": pynvml.nvmlDeviceGetName(device),
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "total": memory and memory.total,
        "free": memory and memory.free,
        "mig": mig,
        "slices": mig_profiles(device) if mig else [],
        "users": users(device),
    }


def mig_profiles(device: Any) -> list[str]:
    """Return the profiles of a GPU's MIG slices: "3g.40gb" of "NVIDIA H100 80GB HBM3 MIG 3g.40gb"."""
    profiles = []
    for index in range(optional(lambda: pynvml.nvmlDeviceGetMaxMigDeviceCount(device)) or 0):
        name = optional(lambda: pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)))  # noqa: B023
        if name is not None:
            profiles.append(name.rpartition("MIG ")[2])
    return profiles


def users(device: Any) -> list[str]:
    """Return the processes that hold memory, such as "python (pid 17)"."""
    texts = []
    for process in optional(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(device)) or []:
        name = optional(lambda: pynvml.nvmlSystemGetProcessName(process.pid)) or ""  # noqa: B023
        texts.append(f"{os.path.basename(name.split(' ')[0]) or 'a process'} (pid {process.pid})")
    return texts


def optional(call: Callable[[], T]) -> T | None:
    """Return the result of a query, or None if the driver does not support it."""
    try:
        return call()
    except pynvml.NVMLError:
        return None


if __name__ == "__main__":
    print(json.dumps(query()), flush=True)
    os._exit(0)  # without NVML's clean-up, which may hang as well
