"""Resource usage of process trees (CPU and memory) and of GPUs (as nvidia-smi reports it) while they are measured."""

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
"""Sampling interval."""
MEMORY_SECONDS = 2.0
"""Sampling interval of memory, which is more expensive: the kernel walks all pages of a process."""


@dataclass(frozen=True)
class Usage:
    """Resource usage in a span of time. None if nvidia-smi reported nothing or the span has too few samples."""

    cores: float | None
    """CPU seconds per second, of all processes of the trees."""
    host_bytes: int | None
    """Peak memory of the trees; pages shared by several processes count once."""
    gpu_busy: float | None
    """Mean of utilization.gpu over time and GPUs, 0 to 1: the share of time in which a kernel was running."""
    gpu_bytes: int | None
    """Peak memory in use on any one GPU, by whichever process."""


class Meter:
    """Samples resource usage in threads while its context is open. Times are those of time.monotonic().

    Args:
        roots: Processes whose trees are measured.
        gpus: Numbers or UUIDs of the GPUs to measure, as nvidia-smi names them.
    """

    def __init__(self, roots: Sequence[int], gpus: Sequence[str]) -> None:
        self._roots, self._gpus = roots, gpus
        self._cpu: list[tuple[float, float]] = []
        self._host: list[tuple[float, int]] = []
        self._busy: list[tuple[float, float]] = []
        self._gpu: list[tuple[float, int]] = []
        self._end = threading.Event()
        samplers = (self._sample_processes, self._sample_gpus)
        self._threads = [threading.Thread(target=sampler, daemon=True) for sampler in samplers]

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

    def usage(self, begin: float, end: float) -> Usage:
        """Return the usage between two points in time."""
        cpu = [(at, seconds) for at, seconds in self._cpu if begin <= at <= end]
        cores = (cpu[-1][1] - cpu[0][1]) / (cpu[-1][0] - cpu[0][0]) if len(cpu) > 1 else None
        busy = [share for at, share in self._busy if begin <= at <= end]
        host = [size for at, size in self._host if begin <= at <= end]
        gpu = [size for at, size in self._gpu if begin <= at <= end]
        return Usage(cores, max(host, default=None), fmean(busy) if busy else None, max(gpu, default=None))

    def _sample_processes(self) -> None:
        cpu_seconds: dict[int, float] = {}  # keeps the last value of processes that have ended
        next_memory = 0.0
        while not self._end.wait(SECONDS):
            processes = tree(self._roots)
            for process in processes:
                try:
                    times = process.cpu_times()
                except psutil.Error:
                    continue
                cpu_seconds[process.pid] = times.user + times.system
            self._cpu.append((time.monotonic(), sum(cpu_seconds.values())))
            if time.monotonic() >= next_memory:
                self._host.append((time.monotonic(), sum(map(memory, processes))))
                next_memory = time.monotonic() + MEMORY_SECONDS

    def _sample_gpus(self) -> None:
        command = ["nvidia-smi", "-i", ",".join(self._gpus), "--query-gpu=utilization.gpu,memory.used"]
        while not self._end.wait(SECONDS):
            try:
                output = subprocess.run([*command, "--format=csv,noheader,nounits"], capture_output=True, text=True)
                lines = [line.split(",") for line in output.stdout.splitlines()]
                busy, used = [float(line[0]) / 100 for line in lines], [int(line[1]) * 2**20 for line in lines]
            except (OSError, ValueError, IndexError):  # no nvidia-smi, or "[N/A]"
                continue
            if lines:
                self._busy.append((time.monotonic(), fmean(busy)))
                self._gpu.append((time.monotonic(), max(used)))


def tree(roots: Sequence[int]) -> list[psutil.Process]:
    """Return the processes and all their descendants."""
    processes = []
    for root in roots:
        try:
            process = psutil.Process(root)
            processes += [process, *process.children(recursive=True)]
        except psutil.Error:
            continue
    return processes


def memory(process: psutil.Process) -> int:
    """Return the bytes of a process, with its share of shared pages; the resident size where the kernel has no PSS."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError, AttributeError):
        pass
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0
