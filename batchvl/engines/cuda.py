"""The GPU as an engine's process sees it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

MEMORY_SECONDS = 60.0
QUIET_SECONDS = 2.0


def count() -> int:
    """How many GPUs torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def name(index: int = 0) -> str:
    return str(torch.cuda.get_device_name(index))


def memory(index: int = 0) -> tuple[int, int]:
    """Bytes that are free and bytes that there are, whoever holds them."""
    free, total = torch.cuda.mem_get_info(index)
    return int(free), int(total)


def told(index: int = 0) -> str:
    """The memory for people."""
    free, total = (number / 2**30 for number in memory(index))
    return f"{name(index)}: {free:.1f} of {total:.1f} GiB are free"


def wait_for_memory(index: int, wanted: int, say: Callable[[str], None]) -> None:
    """Returns once the GPU has `wanted` bytes free, or after MEMORY_SECONDS: what a process that has just died there
    held may take a moment to come back. A GPU that is too small altogether is not waited for.
    """
    start, quiet = time.monotonic(), True
    while (waited := time.monotonic() - start) < MEMORY_SECONDS:
        free, total = memory(index)
        if free >= wanted or total < wanted:
            return
        if waited > QUIET_SECONDS and quiet:
            quiet = False
            say(f"waiting up to {MEMORY_SECONDS:g} s for the GPU's memory: {told(index)}, {wanted / 2**30:.1f} wanted")
        time.sleep(0.5)
