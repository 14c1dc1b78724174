"""The GPU as an engine's process sees it."""

from __future__ import annotations

import time

import torch

MEMORY_SECONDS = 60.0


def count() -> int:
    """How many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def name(index: int = 0) -> str:
    return str(torch.cuda.get_device_name(index))


def memory(index: int = 0) -> tuple[int, int]:
    """Bytes that are free and bytes that there are, whoever holds them."""
    free, total = torch.cuda.mem_get_info(index)
    return int(free), int(total)


def wait_for_memory(index: int, wanted: int) -> None:
    """Returns once the GPU has `wanted` bytes free, or after MEMORY_SECONDS: what a process that has just died there
    held may take a moment to come back. A GPU that is too small altogether is not waited for.
    """
    until = time.monotonic() + MEMORY_SECONDS
    while time.monotonic() < until:
        free, total = memory(index)
        if free >= wanted or total < wanted:
            return
        time.sleep(0.5)
