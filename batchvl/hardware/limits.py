"""How much of this machine is ours: a container's or a Slurm step's share, never the whole host by mistake."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

MIB = 2**20
_CGROUP = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60


def cpus(environment: Mapping[str, str] = os.environ, cgroup: Path = _CGROUP) -> int:
    """CPUs that this process may use: the least of its affinity, its cgroups' quotas and SLURM_CPUS_PER_TASK."""
    bounds = [len(os.sched_getaffinity(0))]
    slurm = environment.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit():
        bounds.append(int(slurm))
    for folder in _groups(cgroup):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            bounds.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue  # "max", or the other version of cgroups
    return max(1, min(bounds))


def memory(environment: Mapping[str, str] = os.environ, cgroup: Path = _CGROUP) -> int:
    """Bytes of memory that this process may use: the least of the host's, its cgroups' and Slurm's grant."""
    bounds = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for folder in _groups(cgroup):
        for name in ("memory.max", "memory.limit_in_bytes", "memory/memory.limit_in_bytes"):
            try:
                limit = int((folder / name).read_text())
            except (OSError, ValueError):
                continue  # "max", or the other version of cgroups
            if limit < _UNLIMITED:
                bounds.append(limit)
    per_node = environment.get("SLURM_MEM_PER_NODE", "")
    per_cpu = environment.get("SLURM_MEM_PER_CPU", "")
    if per_node.isdigit() and int(per_node):
        bounds.append(int(per_node) * MIB)
    elif per_cpu.isdigit() and int(per_cpu):
        bounds.append(int(per_cpu) * MIB * cpus(environment, cgroup))
    return min(bounds)


def oom_kills(cgroup: Path = _CGROUP) -> int:
    """How many processes of our cgroup the kernel has killed for lack of memory; 0 where it does not tell."""
    for folder in _groups(cgroup):
        for name in ("memory.events", "memory.oom_control", "memory/memory.oom_control"):
            with suppress(OSError):
                counts = dict(line.split() for line in (folder / name).read_text().splitlines())
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
    return 0


def _groups(cgroup: Path, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """The process's own cgroup (version 2) and those above it, then the root."""
    try:
        name = next(line[4:] for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return [cgroup]
    path = cgroup / name
    return [path, *(parent for parent in path.parents if parent.is_relative_to(cgroup))]
