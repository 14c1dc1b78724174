"""How an engine's process ended, as its rows, the terminal and whoever has to mend it are told."""

from __future__ import annotations

import logging
import re
import signal
from contextlib import suppress
from pathlib import Path

from ..config.units import pluralize
from ..engines.registry import ENGINE_TYPES
from ..errors import EngineLost, EngineUnavailable
from ..hardware.limits import oom_kills

logger = logging.getLogger(__name__)

DEATHS_BEFORE_FIRST_ANSWER = 2
DEATHS_WITHOUT_PROGRESS = 5
REFUSED_SECONDS = 15.0
"""Before another process is started after a first refusal: a neighbour may have taken the GPU's memory for a moment."""
_LAST_WORDS = 2000
_SEARCHED = 64 * 1024
"""Bytes of the log's end in which the reason may stand: the stacks of a hung process push it up."""
_GPU_FULL = re.compile(r"CUDA out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|out of memory", re.I)
_HOST_FULL = re.compile(r"^MemoryError|std::bad_alloc|DefaultCPUAllocator|Cannot allocate memory", re.M)
_HOST_ADVICE = "give the job more memory (--mem), or lower --image-workers or --arena-bytes"


class EngineExited(Exception):
    """The engine's process ended; the message tells how, with advice where there is some, and its last words."""

    answered = 0
    """How many rows the process had answered before."""

    def __init__(self, text: str, how: str = "ended", advice: str = "") -> None:
        super().__init__(text)
        self.how, self.advice = how, advice
        """In a few words: "was killed by SIGSEGV"; and what to do about it, "" where that is unknown."""


class RestartRefused(EngineExited):
    """A process that took the place of one that had been up would not start: perhaps the next one will."""

    def __init__(self, refusal: EngineUnavailable) -> None:
        text = f"the engine refuses to start again: {refusal}"
        super().__init__(text, text.partition("\n")[0].removeprefix("the engine "))


class Unkillable(EngineExited):
    """A process of the engine's lives on whatever it is sent. Nobody may wait for it, and nothing take its place."""

    def __init__(self, pid: int, state: str, seconds: float) -> None:
        super().__init__(
            f"the engine process {pid} cannot be killed: it is in state {state or 'unknown'}, {seconds:g} s after "
            "SIGKILL, which is the kernel's or a driver's doing: the node needs looking at",
            "cannot be killed",
        )


class RestartPolicy:
    """The deaths of one engine's processes: counted and told, until one is the last. name: the engine's, for people."""

    def __init__(self, name: str, log: Path) -> None:
        self._name, self._log = name, log
        self._told: set[str] = set()
        self.count = 0
        self._in_vain = self._refusals = 0

    def progress(self) -> None:
        """An answer came, or what else makes another try worth it."""
        self._in_vain = 0

    def started(self) -> None:
        """A process is up."""
        self._refusals = 0

    def add(self, died: EngineExited, answers: int, held: int | None) -> None:
        """Counts a death. Raises EngineLost where it was the last.

        answers: how many the run has, whoever gave them. held: rows that died with it, None before it was up.
        """
        self.count += 1
        self._in_vain += 1
        refused = isinstance(died, RestartRefused)
        self._refusals += refused
        told = f"{self._name} {died.how}"
        if not refused:
            told += " while it was starting" if held is None else f" with {pluralize(held)} in it"
        lost = ""
        if not answers and self.count >= DEATHS_BEFORE_FIRST_ANSWER and not refused:
            lost = f"the engine died {self.count} times before its first answer"
        elif self._in_vain >= DEATHS_WITHOUT_PROGRESS:
            lost = f"the engine died {self._in_vain} times without an answer in between"
        if lost:
            logger.error("%s", told)
            raise EngineLost(f"{lost}: {died}")
        again = "tried" if refused else "started"
        logger.warning(f"{told}; it is {again} again" + (f" in {self.pause:g} s" if self.pause else ""))
        if not refused:
            after = "; its rows are asked again after all others, in ever smaller groups" if held else ""
            self._once("words", f"note: its last words are in {self._log}{after}")
            self._once(died.advice, died.advice)

    @property
    def pause(self) -> float:
        """Seconds to wait before the next process is started: longer after each refusal in a row."""
        return REFUSED_SECONDS * 2 ** (self._refusals - 1) if self._refusals else 0.0

    def _once(self, what: str, text: str) -> None:
        if text and what not in self._told:
            self._told.add(what)
            logger.warning("%s", text)


class ExitDiagnoser:
    """Knows from a process's start on what it takes to tell of its death."""

    def __init__(self, engine: str, log: Path, log_start: int) -> None:
        self._engine, self._log, self._log_start = engine, log, log_start
        self._oom_kills = oom_kills()

    def died(self, code: int, ended_for: str | None = None, how: str = "") -> EngineExited:
        """The death of a process with this exit code; `ended_for` is why we ended it, where we did, `how` in short."""
        killed = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if ended_for is not None:
            killed = f"was ended: {ended_for}"
        log = self._tail()
        advice = self._advice(log, -code if ended_for is None else 0)
        words = log[-_LAST_WORDS:].strip()
        lines = [f"the engine process {killed}", advice, f"its last words, from {self._log}:\n{words}" if words else ""]
        return EngineExited("\n".join(filter(None, lines)), how or killed, advice)

    def _advice(self, log: str, by_signal: int) -> str:
        if by_signal == signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"the kernel killed it for lack of memory: {_HOST_ADVICE}"
        if _HOST_FULL.search(log):
            return f"it had too little memory: {_HOST_ADVICE}"
        if _GPU_FULL.search(log):
            return f"the GPU's memory was full: {ENGINE_TYPES[self._engine].gpu_memory_advice}"
        if by_signal == signal.SIGKILL:
            return f"perhaps it was the kernel, for lack of memory: {_HOST_ADVICE}"
        return ""

    def _tail(self) -> str:
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _SEARCHED))
            lines = file.read().decode("utf-8", "replace").split("\n")
            return "\n".join(filter(None, (line.rstrip().rpartition("\r")[2] for line in lines)))  # bars, at their last
        return ""
