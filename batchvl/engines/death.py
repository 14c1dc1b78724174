"""How an engine's process ended, as its rows, the terminal and whoever has to mend it are told."""

from __future__ import annotations

import re
import signal
from contextlib import suppress
from pathlib import Path

from ..resources import oom_kills

_LAST_WORDS = 2000
_SEARCHED = 64 * 1024
"""Bytes of the log's end in which the reason may stand: the stacks of a hung process push it up."""
_GPU_FULL = re.compile(r"CUDA out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|out of memory", re.I)
_HOST_FULL = re.compile(r"^MemoryError|std::bad_alloc|DefaultCPUAllocator|Cannot allocate memory", re.M)
_GPU_ADVICE = {
    "lmdeploy": "lower --cache-max-entry-count, --session-len or --engine-option max_batch_size=N, take a quantised "
    "model, or share it among more GPUs (--tp)"
}
_GPU_ADVICE_OTHERWISE = "lower --batch-size, --max-tiles or --max-new-tokens, or take a smaller model"
_HOST_ADVICE = "give the job more memory (--mem), or lower --image-workers or --arena-bytes"


class EngineDied(Exception):
    """The engine's process ended; the message tells how, with advice where there is some, and its last words."""

    answered = 0
    """How many rows the process had answered before."""

    def __init__(self, text: str, how: str = "ended", advice: str = "") -> None:
        super().__init__(text)
        self.how, self.advice = how, advice
        """In a few words: "was killed by SIGSEGV"; and what to do about it, "" where that is unknown."""


class Witness:
    """Knows from a process's start on what it takes to tell of its death."""

    def __init__(self, engine: str, log: Path, log_start: int) -> None:
        self._engine, self._log, self._log_start = engine, log, log_start
        self._oom_kills = oom_kills()

    def died(self, code: int, ended_for: str | None = None, how: str = "") -> EngineDied:
        """The death of a process with this exit code; `ended_for` is why we ended it, where we did, `how` in short."""
        killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if ended_for is not None:
            killed = f"was ended: {ended_for}"
        log = self._tail()
        advice = self._advice(log, -code if ended_for is None else 0)
        words = log[-_LAST_WORDS:].strip()
        lines = [f"the engine process {killed}", advice, f"its last words, from {self._log}:\n{words}" if words else ""]
        return EngineDied("\n".join(filter(None, lines)), how or killed, advice)

    def _advice(self, log: str, by_signal: int) -> str:
        if by_signal == signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"the kernel killed it for lack of memory: {_HOST_ADVICE}"
        if _HOST_FULL.search(log):
            return f"it had too little memory: {_HOST_ADVICE}"
        if _GPU_FULL.search(log):
            return f"the GPU's memory was full: {_GPU_ADVICE.get(self._engine, _GPU_ADVICE_OTHERWISE)}"
        if by_signal == signal.SIGKILL:
            return f"perhaps it was the kernel, for lack of memory: {_HOST_ADVICE}"
        return ""

    def _tail(self) -> str:
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _SEARCHED))
            lines = file.read().decode("utf-8", "replace").split("\n")
            return "\n".join(filter(None, (line.rstrip().rpartition("\r")[2] for line in lines)))  # bars, at their last
        return ""
