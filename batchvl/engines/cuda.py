"""The GPU as the engine's process sees it, through torch."""

from __future__ import annotations

import logging
import time

import torch

logger = logging.getLogger(__name__)

MEMORY_SECONDS = 60.0
"""How long to wait for memory that another process has yet to release."""
QUIET_SECONDS = 2.0
"""How long to wait before that is logged."""


def count() -> int:
    """Return the number of GPUs that torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def name(index: int = 0) -> str:
    """Return the model of a GPU, such as "NVIDIA H200"."""
    return str(torch.cuda.get_device_name(index))


def memory(index: int = 0) -> tuple[int, int]:
    """Return a GPU's free and total bytes, whichever process uses the rest."""
    free, total = torch.cuda.mem_get_info(index)
    return int(free), int(total)


def describe_memory(index: int = 0) -> str:
    """Return a GPU's name and memory in human-readable form."""
    free, total = (number / 2**30 for number in memory(index))
    return f"{name(index)}: {free:.1f} of {total:.1f} GiB are free"


def wait_for_memory(index: int, needed: int) -> None:
    """Wait until a GPU has `needed` bytes free, for at most MEMORY_SECONDS.

    The memory of a process that has just died may take a moment to be released. Returns at once if the GPU is too small
    altogether.
    """
    start, logged = time.monotonic(), False
    while (waited := time.monotonic() - start) < MEMORY_SECONDS:
        free, total = memory(index)
        if free >= needed or total < needed:
            return
        if waited > QUIET_SECONDS and not logged:
            logged = True
            logger.info(
                f"waiting up to {MEMORY_SECONDS:g} s for GPU memory: {describe_memory(index)}, "
                f"{needed / 2**30:.1f} GiB are needed"
            )
        time.sleep(0.5)
