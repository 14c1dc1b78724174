"""The device and data type that a model runs with."""

from __future__ import annotations

import re

import torch

from ...errors import EngineUnavailable, OptionError
from ...hardware.limits import cpus

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str) -> torch.device:
    """Return the torch device for "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        OptionError: The name is none of these.
        EngineUnavailable: There is no such GPU here.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not match:
        raise OptionError(f"--device {device}: want auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise EngineUnavailable(f"--device {device}: {reason} (torch {torch.__version__}); --device cpu works here")
    index = int(match[1] or 0)
    if index >= (count := torch.cuda.device_count()):
        raise EngineUnavailable(f"--device {device}: found {count} GPUs (cuda:0 to cuda:{count - 1})")
    return torch.device("cuda", index)


def choose_dtype(dtype: str, device: torch.device) -> str:
    """Return the data type for weights and pixels; for "auto", the fastest that the device computes natively.

    On a CPU, bfloat16 pays only with AVX512-BF16 or AMX; elsewhere it is emulated and slower than float32.
    """
    if dtype != "auto":
        return dtype
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def device_name(device: torch.device) -> str:
    """Return a human-readable name: "cpu", "cuda:0 NVIDIA H200"."""
    return "cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"


def default_threads() -> int:
    """Return the number of compute threads for a CPU: one CPU is left to the runner and the image workers.

    OpenMP threads spin while they wait for each other, so one thread more than there are free CPUs is several times
    slower.
    """
    return max(1, cpus() - 1)
