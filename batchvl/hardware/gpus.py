"""The GPUs of this machine, as NVIDIA's driver reports them (without torch), and which of them each replica uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import msgspec

from ..config.options import RunOptions
from ..errors import OptionError
from .commands import run_command

QUERY_SECONDS = 30.0
"""Time limit of the driver's answer. Without the persistence daemon, initialising many GPUs takes seconds."""
VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"

_DEV = Path("/dev")
_NVML = Path(__file__).with_name("nvml.py")


class NoGpu(Exception):
    """No GPU can be used here. The message gives the reason."""


class DriverHangs(NoGpu):
    """The driver did not answer, so that nothing is known about the GPUs."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU. Amounts of memory are None if the driver does not report them, as for a MIG slice in a container."""

    index: int
    uuid: str
    name: str
    driver: str
    """The driver's version."""
    total: int | None
    """Bytes of memory."""
    free: int | None
    """Bytes of free memory."""
    mig: bool = False
    """Whether the GPU is partitioned (Multi-Instance GPU)."""
    slices: tuple[str, ...] = ()
    """The profiles of its MIG slices, such as 3g.40gb."""
    users: tuple[str, ...] = ()
    """Processes that hold memory, such as "python (pid 17)". Those of other containers are not listed."""

    @property
    def busy(self) -> bool:
        """Whether more than a tenth of the memory is in use."""
        return bool(self.total and self.free is not None and not self.mig and self.free < 0.9 * self.total)


class _Answer(msgspec.Struct):
    gpus: list[Gpu] = []
    error: str = ""


def list_gpus(timeout: float = QUERY_SECONDS) -> list[Gpu]:
    """Return all GPUs of this machine or container, whatever CUDA_VISIBLE_DEVICES says.

    Raises:
        NoGpu: There is none.
        DriverHangs: The driver did not answer within `timeout` seconds.
    """
    try:
        code, output = run_command([sys.executable, "-P", str(_NVML)], timeout)
    except TimeoutError:
        raise DriverHangs(f"the NVIDIA driver did not answer within {timeout:g} s") from None
    lines = [line for line in output.splitlines() if line.strip()]
    if code or not lines:
        raise NoGpu(f"cannot ask the NVIDIA driver: {lines[-1][:200] if lines else f'exit code {code}'}")
    answer = msgspec.json.decode(lines[-1], type=_Answer)
    if answer.error:
        raise NoGpu(answer.error)
    return answer.gpus


def parse_visible_devices(environment: Mapping[str, str] = os.environ) -> list[str] | None:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or UUID, or None if it is not set.

    Like CUDA, ignore the first entry that cannot name a GPU and all that follow it.

    >>> parse_visible_devices({"CUDA_VISIBLE_DEVICES": "2, GPU-8c5b,-1,0"})
    ['2', 'GPU-8c5b']
    """
    value = environment.get(VISIBLE_DEVICES)
    if value is None:
        return None
    names = map(str.strip, value.split(","))
    return list(takewhile(lambda name: name.isdecimal() or name.startswith(("GPU-", "MIG-")), names))


def filter_visible(gpus: Iterable[Gpu], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES selects, in its order; all of them if it is not set."""
    gpus, names = list(gpus), parse_visible_devices(environment)
    if names is None:
        return gpus
    visible: list[Gpu] = []
    for name in names:
        gpu = next((gpu for gpu in gpus if _is_named(gpu, name)), None)
        if gpu is None:
            break
        if gpu not in visible:
            visible.append(gpu)
    return visible


def visible_gpus(environment: Mapping[str, str] = os.environ, dev: Path = _DEV) -> list[str]:
    """Return the NVIDIA GPUs that CUDA would use, by number or, if CUDA_VISIBLE_DEVICES holds UUIDs, by UUID.

    Counts the device files in `dev`: asking the driver may take seconds.
    """
    # In the Windows Subsystem for Linux, one device file stands for all GPUs.
    count = len(list(dev.glob("nvidia[0-9]*"))) or int((dev / "dxg").exists())
    names = parse_visible_devices(environment)
    if names is None:
        return [str(number) for number in range(count)]
    return list(takewhile(lambda name: count and not (name.isdecimal() and int(name) >= count), names))


class GpuAssignment(NamedTuple):
    """The GPUs of a replica, and the environment variables that restrict it to them."""

    gpus: tuple[int, ...] = ()
    """Numbers, as CUDA counts the visible GPUs. Empty: the engine chooses among all of them."""
    environment: Mapping[str, str] = {}

    @property
    def tag(self) -> str:
        """The GPUs as part of a file's name: "gpu1", "gpu2-3"."""
        return "gpu" + "-".join(map(str, self.gpus))

    def __str__(self) -> str:
        return f"GPU{'s' * (len(self.gpus) > 1)} {', '.join(map(str, self.gpus))}"


def assign_gpus(
    options: RunOptions, per_replica: int, environment: Mapping[str, str] = os.environ, dev: Path = _DEV
) -> list[GpuAssignment]:
    """Assign the GPUs that `--gpus` asks for to replicas.

    A single replica is not restricted: it sees every visible GPU, and its engine chooses.

    Args:
        options: The run's options.
        per_replica: GPUs that each replica gets; 0 for an engine that uses none.
        environment: Environment variables, of which CUDA_VISIBLE_DEVICES is read.
        dev: Directory of the device files.

    Raises:
        OptionError: There are too few GPUs, or the options contradict each other.
    """
    engine = options.engine
    if engine.gpus == 1:
        return [GpuAssignment()]
    flag = f"--gpus {engine.gpus}"
    if engine.device not in ("auto", "cuda"):
        raise OptionError(f"{flag}: conflicts with --device {engine.device}, which names one device; use one of them")
    names = visible_gpus(environment, dev)
    if not per_replica:
        return [GpuAssignment((number,)) for number in range(engine.gpus or max(1, len(names)))]
    if len(names) < max(engine.gpus, per_replica):
        count = {0: "no NVIDIA GPU", 1: "1 GPU"}.get(len(names), f"{len(names)} GPUs")
        variable = environment.get(VISIBLE_DEVICES)
        reason = "" if variable is None else f" ({VISIBLE_DEVICES}={variable})"
        raise OptionError(f"{flag}: found {count} here{reason}")
    if engine.gpus % per_replica:
        raise OptionError(f"{flag}: must be a multiple of {per_replica}, the GPUs of each replica")
    starts = range(0, (engine.gpus or len(names)) - per_replica + 1, per_replica)
    groups = [tuple(range(start, start + per_replica)) for start in starts]
    if len(groups) == 1:
        return [GpuAssignment()]
    return [GpuAssignment(group, {VISIBLE_DEVICES: ",".join(names[gpu] for gpu in group)}) for group in groups]


def _is_named(gpu: Gpu, name: str) -> bool:
    if name.startswith("MIG-"):  # the UUID of a slice does not tell which GPU it is part of
        return gpu.mig
    return gpu.index == int(name) if name.isdecimal() else gpu.uuid.startswith(name)
