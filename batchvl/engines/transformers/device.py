"""Where the model computes, and in which type."""

from __future__ import annotations

import re

import torch

from ...errors import EngineUnavailable, OptionError
from ...hardware.limits import cpus

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(wanted: str) -> torch.device:
    """The device that "auto", "cpu", "cuda" or "cuda:N" means here. Raises OptionError, EngineUnavailable."""
    if wanted == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    number = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if not number:
        raise OptionError(f"--device {wanted}: want auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        raise EngineUnavailable(f"--device {wanted}: {why} (torch {torch.__version__}); --device cpu works here")
    index = int(number[1] or 0)
    if index >= torch.cuda.device_count():
        raise EngineUnavailable(f"--device {wanted}: there are only {torch.cuda.device_count()} GPUs, from cuda:0")
    return torch.device("cuda", index)


def choose_dtype(wanted: str, device: torch.device) -> str:
    """The type of weights and pixels: "auto" is the fastest that the device computes natively.

    bfloat16 on a CPU pays only with AVX512-BF16 or AMX; elsewhere it is emulated and slower than float32.
    """
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def describe(device: torch.device) -> str:
    """For people: "cpu", "cuda:0 NVIDIA H200"."""
    return "cpu" if device.type == "cpu" else f"{device} {torch.cuda.get_device_name(device)}"


def default_threads() -> int:
    """Threads to compute with on a CPU: one CPU is left to the runner and the image workers.

    OpenMP's threads spin while they wait for each other: one more than there are free CPUs costs a multiple.
    """
    return max(1, cpus() - 1)
