"""The GPUs of this machine and who uses them, as nvidia-smi tells; torch is not needed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..config.options import RunOptions
from ..errors import OptionError
from .commands import run_command

SECONDS = 30.0
"""How long nvidia-smi may take. Without its persistence daemon the driver needs seconds to wake many GPUs."""
_FIELDS = "index,uuid,name,driver_version,memory.total,memory.free,mig.mode.current"
_MIB = 2**20


class NoGpu(Exception):
    """There is no GPU that could be used; the message says why."""


class NoAnswer(NoGpu):
    """nvidia-smi hangs: there may be one."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. Bytes are None where the driver does not tell them, as for a slice in a container."""

    index: int
    uuid: str
    name: str
    driver: str
    total: int | None
    free: int | None
    mig: bool = False
    slices: tuple[str, ...] = ()
    """With MIG: the profiles of its slices, such as 3g.40gb."""
    users: tuple[str, ...] = field(default=())
    """Processes that have memory there, as "python (pid 17)". Empty as well where they are in other containers."""

    @property
    def busy(self) -> bool:
        """Whether more than a tenth of its memory is taken."""
        return bool(self.total and self.free is not None and not self.mig and self.free < 0.9 * self.total)


def gpus(seconds: float = SECONDS) -> list[Gpu]:
    """All GPUs that this process could be given, whatever CUDA_VISIBLE_DEVICES says. Raises NoGpu."""
    try:
        code, said = run_command(["nvidia-smi", f"--query-gpu={_FIELDS}", "--format=csv,noheader,nounits"], seconds)
    except FileNotFoundError:
        raise NoGpu("no NVIDIA driver: nvidia-smi is not there") from None
    except TimeoutError as error:
        raise NoAnswer(str(error)) from None
    except OSError as error:
        raise NoGpu(f"nvidia-smi cannot be started: {error.strerror}") from None
    rows = [[cell.strip() for cell in line.split(",")] for line in said.splitlines()]
    rows = [row for row in rows if len(row) == 7 and row[0].isdigit()]
    if not rows:
        words = " ".join(said.split())
        raise NoGpu(f"nvidia-smi says: {words[:200] or f'nothing, and ends with {code}'}")
    users, slices = _users(seconds), _slices(seconds) if any(row[6] == "Enabled" for row in rows) else {}
    return [
        Gpu(
            int(index), uuid, name, driver, _bytes(total), _bytes(free),
            mig == "Enabled", slices.get(uuid, ()), users.get(uuid, ()),
        )
        for index, uuid, name, driver, total, free, mig in rows
    ]  # fmt: skip


def filter_visible(found: Iterable[Gpu], environment: Mapping[str, str] = os.environ) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order. As for CUDA, a name that means none ends the list."""
    found, wanted = list(found), environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return found
    left: list[Gpu] = []
    for name in filter(None, (name.strip() for name in wanted.split(","))):
        # A MIG slice's own UUID says not of which GPU it is.
        named = [g for g in found if (g.mig if name.startswith("MIG-") else _names(name, g))]
        if not named:
            break
        left += [gpu for gpu in named[:1] if gpu not in left]
    return left


def _names(name: str, gpu: Gpu) -> bool:
    return str(gpu.index) == name if name.isdigit() else name.startswith("GPU-") and gpu.uuid.startswith(name)


def _users(seconds: float) -> dict[str, tuple[str, ...]]:
    """The processes of each GPU, by its UUID."""
    users: dict[str, tuple[str, ...]] = {}
    for line in _lines(
        ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name", "--format=csv,noheader"], seconds
    ):
        uuid, _, rest = line.partition(", ")
        pid, _, name = rest.partition(", ")
        if pid.isdigit():
            program = "" if name.startswith("[") else os.path.basename(name.split(" ")[0])
            users[uuid] = (*users.get(uuid, ()), f"{program or 'a process'} (pid {pid})")
    return users


def _slices(seconds: float) -> dict[str, tuple[str, ...]]:
    """The MIG profiles of each GPU, by its UUID."""
    slices: dict[str, tuple[str, ...]] = {}
    uuid = ""
    for line in _lines(["nvidia-smi", "-L"], seconds):
        if whole := re.match(r"GPU \d+: .*\(UUID: (\S+)\)", line):
            uuid = whole[1]
        elif part := re.match(r"\s+MIG (\S+)\s+Device", line):
            slices[uuid] = (*slices.get(uuid, ()), part[1])
    return slices


def _lines(command: list[str], seconds: float) -> Iterator[str]:
    try:
        code, said = run_command(command, seconds)
    except OSError:
        return
    if code == 0:
        yield from said.splitlines()


def _bytes(mib: str) -> int | None:
    """Memory as nvidia-smi writes it: MiB, or "[N/A]" and the like."""
    return int(mib) * _MIB if mib.isdigit() else None


_DEV = Path("/dev")


class GpuAssignment(NamedTuple):
    """GPUs for a replica, by their numbers as CUDA counts them here, and what its environment is to say of them."""

    gpus: tuple[int, ...] = ()
    environment: Mapping[str, str] = {}

    @property
    def tag(self) -> str:
        """For the names of files: "gpu1", "gpu2-3"."""
        return "gpu" + "-".join(map(str, self.gpus))

    def __str__(self) -> str:
        return f"GPU{'s' * (len(self.gpus) > 1)} {', '.join(map(str, self.gpus))}"


def visible_gpus(environment: Mapping[str, str] = os.environ, dev: Path = _DEV) -> list[str]:
    """The NVIDIA GPUs that CUDA would find, as CUDA_VISIBLE_DEVICES names them: numbers, or UUIDs where it has some."""
    # In Windows' subsystem for Linux one device stands for them all.
    count = len(list(dev.glob("nvidia[0-9]*"))) or int((dev / "dxg").exists())
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if told is None:
        return [str(number) for number in range(count)]
    names: list[str] = []
    for name in map(str.strip, told.split(",")):
        if not count or not (int(name) < count if name.isdigit() else name.startswith(("GPU-", "MIG-"))):
            break  # as for CUDA, a name that means no GPU ends the list
        names.append(name)
    return names


def assign_gpus(
    options: RunOptions, environment: Mapping[str, str] = os.environ, dev: Path = _DEV
) -> list[GpuAssignment]:
    """One for each replica that `--gpus` asks for. Raises OptionError where that cannot be.

    A lone replica's place says nothing: its engine sees what there is, and chooses.
    """
    engine, tp = options.engine, options.lmdeploy.tp
    if engine.gpus == 1:
        return [GpuAssignment()]
    asked = f"--gpus {engine.gpus}"
    if engine.device not in ("auto", "cuda"):
        raise OptionError(
            f"{asked}: --device {engine.device} names one device; leave it out, and each GPU has an engine"
        )
    names = visible_gpus(environment, dev)
    if engine.engine == "fake":  # which needs none
        return [GpuAssignment((number,)) for number in range(engine.gpus or max(1, len(names)))]
    told = environment.get("CUDA_VISIBLE_DEVICES")
    if len(names) < max(engine.gpus, tp):
        found = {0: "no NVIDIA GPU", 1: "1 GPU"}.get(len(names), f"{len(names)} GPUs")
        raise OptionError(f"{asked}: found {found} here" + ("" if told is None else f" (CUDA_VISIBLE_DEVICES={told})"))
    if engine.gpus % tp:
        raise OptionError(f"{asked}: is no multiple of --tp {tp}, the GPUs of each engine")
    groups = [tuple(range(at, at + tp)) for at in range(0, (engine.gpus or len(names)) - tp + 1, tp)]
    if len(groups) == 1:
        return [GpuAssignment()]
    return [GpuAssignment(group, {"CUDA_VISIBLE_DEVICES": ",".join(names[gpu] for gpu in group)}) for group in groups]
