"""What processes use while they are measured: CPU and memory of their trees, and the GPUs as nvidia-smi tells."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from types import TracebackType

import psutil

SECONDS = 0.5
MEMORY_SECONDS = 2.0
"""Between looks at memory, which cost more: the kernel goes through all of a process's pages."""


@dataclass(frozen=True)
class Use:
    """Of a span of time. None where nvidia-smi said nothing, or the span was too short to look."""

    cores: float | None
    """CPU seconds a second, of all processes of the trees."""
    host_bytes: int | None
    """Most that the trees had at once; pages that several processes share are counted once."""
    gpu_busy: float | None
    """Mean of utilization.gpu, 0 to 1: the share of time in which the GPU computed anything. Mean of the GPUs."""
    gpu_bytes: int | None
    """Most that was taken of any one GPU, by whomever."""


class Meter:
    """Looks from its start to its end, as a context, at the trees below the processes `roots`.

    gpus: what nvidia-smi calls those to look at: numbers or UUIDs. Times are those of time.monotonic().
    """

    def __init__(self, roots: Sequence[int], gpus: Sequence[str]) -> None:
        self._roots, self._gpus = roots, gpus
        self._cpu: list[tuple[float, float]] = []
        self._host: list[tuple[float, int]] = []
        self._busy: list[tuple[float, float]] = []
        self._gpu: list[tuple[float, int]] = []
        self._end = threading.Event()
        self._threads = [threading.Thread(target=look, daemon=True) for look in (self._look, self._look_at_gpus)]

    def __enter__(self) -> Meter:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def use(self, begin: float, end: float) -> Use:
        """What was used between two moments."""
        cpu = [(at, seconds) for at, seconds in self._cpu if begin <= at <= end]
        cores = (cpu[-1][1] - cpu[0][1]) / (cpu[-1][0] - cpu[0][0]) if len(cpu) > 1 else None
        busy = [share for at, share in self._busy if begin <= at <= end]
        host = [taken for at, taken in self._host if begin <= at <= end]
        gpu = [taken for at, taken in self._gpu if begin <= at <= end]
        return Use(cores, max(host, default=None), fmean(busy) if busy else None, max(gpu, default=None))

    def _look(self) -> None:
        known: dict[int, float] = {}
        next_memory = 0.0
        while not self._end.wait(SECONDS):
            processes = tree(self._roots)
            for process in processes:
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue  # it has just ended, and what it had used last time counts
                known[process.pid] = times.user + times.system
            self._cpu.append((time.monotonic(), sum(known.values())))
            if time.monotonic() >= next_memory:
                self._host.append((time.monotonic(), sum(map(memory, processes))))
                next_memory = time.monotonic() + MEMORY_SECONDS

    def _look_at_gpus(self) -> None:
        command = ["nvidia-smi", "-i", ",".join(self._gpus), "--query-gpu=utilization.gpu,memory.used"]
        while not self._end.wait(SECONDS):
            try:
                said = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True)
                lines = [line.split(",") for line in said.stdout.splitlines()]
                busy, taken = [float(line[0]) / 100 for line in lines], [int(line[1]) * 2**20 for line in lines]
            except (OSError, ValueError, IndexError):  # not there, or "[N/A]"
                continue
            if lines:
                self._busy.append((time.monotonic(), fmean(busy)))
                self._gpu.append((time.monotonic(), max(taken)))


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """The processes, those that they have started, and so on."""
    found = []
    for root in roots:
        try:
            process = psutil.Process(root)
            found += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return found


def memory(process: psutil.Process) -> int:
    """Bytes of a process: of pages that it shares with others its part. All of them where the kernel does not tell."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError, AttributeError):
        pass
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
