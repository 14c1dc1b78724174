"""Exits of an engine's processes: their diagnosis, and the policy that decides whether another process follows."""

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

MAX_EXITS_BEFORE_FIRST_ANSWER = 2
MAX_EXITS_WITHOUT_PROGRESS = 5
REFUSED_SECONDS = 15.0
"""Seconds before the restart after a first refusal: another job may use the GPU's memory only briefly."""
_QUOTED_BYTES = 2000
"""Bytes of the log's end that an error message quotes."""
_SEARCHED_BYTES = 64 * 1024
"""Bytes of the log's end that are searched for the reason. The stacks of a hung process may follow it."""
_GPU_FULL = re.compile(r"CUDA out of memory|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY|out of memory", re.I)
_HOST_FULL = re.compile(r"^MemoryError|std::bad_alloc|DefaultCPUAllocator|Cannot allocate memory", re.M)
_HOST_ADVICE = "give the job more memory (--mem), or lower --image-workers or --arena-bytes"


class EngineExited(Exception):
    """An engine's process exited. The message says how, with advice if there is any, and quotes the end of its log.

    Args:
        text: The message.
        summary: What happened, in a few words, such as "was killed by SIGSEGV".
        advice: What to do about it; "" if unknown.
    """

    answered = 0
    """Number of rows that the process had answered."""
    in_flight = 0
    """Number of rows that the process held."""
    time = 0.0
    """When it exited, on the monotonic clock."""

    def __init__(self, text: str, summary: str = "exited", advice: str = "") -> None:
        super().__init__(text)
        self.summary, self.advice = summary, advice


class RestartRefused(EngineExited):
    """The engine refused to start again after it had been up. The next attempt may succeed."""

    def __init__(self, refusal: EngineUnavailable) -> None:
        text = f"the engine refuses to restart: {refusal}"
        super().__init__(text, text.partition("\n")[0].removeprefix("the engine "))


class Unkillable(EngineExited):
    """A process of the engine survives SIGKILL. Nothing waits for it, and no other process takes its place."""

    def __init__(self, pid: int, state: str, seconds: float) -> None:
        super().__init__(
            f"cannot kill the engine process {pid}: it is in state {state or 'unknown'} {seconds:g} s after SIGKILL, "
            "probably stuck in the kernel or in a driver; check the node",
            "cannot be killed",
        )


class RestartPolicy:
    """Count and log the exits of one replica's processes, until one is the last.

    Args:
        name: The engine's name in log messages.
        log: File with the processes' output.
    """

    def __init__(self, name: str, log: Path) -> None:
        self._name, self._log = name, log
        self._logged: set[str] = set()
        self._without_progress = self._refusals = 0
        self.count = 0
        """Number of exits so far."""

    def note_progress(self) -> None:
        """Note an answer, or anything else that makes another attempt worthwhile."""
        self._without_progress = 0

    def on_start(self) -> None:
        """Note that a process is up."""
        self._refusals = 0

    def record(self, exited: EngineExited, *, any_answers: bool, was_up: bool) -> None:
        """Count and log an exit.

        Args:
            exited: The exit.
            any_answers: Whether any replica of the run has answered a row.
            was_up: Whether the process had started.

        Raises:
            EngineLost: No other process is worth starting.
        """
        self.count += 1
        self._without_progress += 1
        refused = isinstance(exited, RestartRefused)
        self._refusals += refused
        event = f"{self._name} {exited.summary}"
        if not refused:
            event += f" with {pluralize(exited.in_flight)} in flight" if was_up else " while it was starting"
        if verdict := self._verdict(any_answers or refused):
            logger.error("%s", event)
            raise EngineLost(f"{verdict}: {exited}")
        delay = f" in {self.pause:g} s" if self.pause else ""
        logger.warning(f"{event}; restarting it{delay}")
        if not refused:
            retried = "; its rows are retried after all others, in smaller and smaller groups" * bool(exited.in_flight)
            self._log_once("log", f"see {self._log} for its last output{retried}")
            self._log_once(exited.advice, exited.advice)

    def _verdict(self, any_answers: bool) -> str:
        """Return why no other process is worth starting, or ""."""
        if not any_answers and self.count >= MAX_EXITS_BEFORE_FIRST_ANSWER:
            return f"the engine died {self.count} times before its first answer"
        if self._without_progress >= MAX_EXITS_WITHOUT_PROGRESS:
            return f"the engine died {self._without_progress} times without an answer in between"
        return ""

    @property
    def pause(self) -> float:
        """Seconds to wait before the next process is started: longer after each consecutive refusal."""
        return REFUSED_SECONDS * 2 ** (self._refusals - 1) if self._refusals else 0.0

    def _log_once(self, topic: str, text: str) -> None:
        if text and topic not in self._logged:
            self._logged.add(topic)
            logger.warning("%s", text)


class ExitDiagnoser:
    """Explain how a process exited. Created when the process starts, since it compares with the state at that time.

    Args:
        engine: Name of the engine, for advice.
        log: File with the process's output.
        log_start: Size of the log when the process started.
    """

    def __init__(self, engine: str, log: Path, log_start: int) -> None:
        self._gpu_advice, self._log, self._log_start = ENGINE_TYPES[engine].gpu_memory_advice, log, log_start
        self._oom_kills = oom_kills()

    def diagnose(self, code: int, kill_reason: str | None = None, summary: str = "") -> EngineExited:
        """Return the exit of the process.

        Args:
            code: Exit code, negative for a signal.
            kill_reason: Why the runner killed the process, if it did.
            summary: What happened, in a few words; by default derived from the code or the reason.
        """
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if kill_reason is not None:
            cause = f"was killed: {kill_reason}"
        log = self._read_log_end()
        advice = self._advice(log, -code if kill_reason is None else 0)
        quote = log[-_QUOTED_BYTES:].strip()
        lines = [f"the engine process {cause}", advice, f"its last output, from {self._log}:\n{quote}" if quote else ""]
        return EngineExited("\n".join(filter(None, lines)), summary or cause, advice)

    def _advice(self, log: str, by_signal: int) -> str:
        if by_signal == signal.SIGKILL and oom_kills() > self._oom_kills:
            return f"the kernel killed it because memory ran out: {_HOST_ADVICE}"
        if _HOST_FULL.search(log):
            return f"it ran out of memory: {_HOST_ADVICE}"
        if _GPU_FULL.search(log):
            return f"it ran out of GPU memory: {self._gpu_advice}"
        if by_signal == signal.SIGKILL:
            return f"the kernel may have killed it because memory ran out: {_HOST_ADVICE}"
        return ""

    def _read_log_end(self) -> str:
        """Return the end of the process's output, without blank lines; of a progress bar only its last state."""
        with suppress(OSError), self._log.open("rb") as file:
            file.seek(max(self._log_start, self._log.stat().st_size - _SEARCHED_BYTES))
            lines = file.read().decode("utf-8", "replace").split("\n")
            return "\n".join(filter(None, (line.rstrip().rpartition("\r")[2] for line in lines)))
        return ""
