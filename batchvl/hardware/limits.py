"""The CPUs and memory that this process may use: its cgroup's or Slurm step's share, not the whole host."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .slurm import MIB, cpus_per_task, granted_memory

__all__ = ["MIB", "cgroup_directories", "cpus", "memory", "oom_kills"]

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_UNLIMITED = 2**60


def cpus(environment: Mapping[str, str] = os.environ, cgroup: Path = _CGROUP) -> int:
    """Return the number of usable CPUs: the minimum of the affinity mask, cgroup quotas and SLURM_CPUS_PER_TASK."""
    limits = [len(os.sched_getaffinity(0))]
    if granted := cpus_per_task(environment):
        limits.append(granted)
    for directory in cgroup_directories(cgroup):
        try:
            quota, period = (directory / "cpu.max").read_text().split()
            limits.append(math.ceil(int(quota) / int(period)))
        except (OSError, ValueError):
            continue  # "max", or cgroup version 1
    return max(1, min(limits))


def memory(environment: Mapping[str, str] = os.environ, cgroup: Path = _CGROUP) -> int:
    """Return the usable memory in bytes: the minimum of the host's, the cgroup limits and Slurm's grant."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for directory in cgroup_directories(cgroup):
        for name in ("memory.max", "memory.limit_in_bytes", "memory/memory.limit_in_bytes"):
            try:
                limit = int((directory / name).read_text())
            except (OSError, ValueError):
                continue  # "max", or the other version of cgroups
            if limit < _UNLIMITED:
                limits.append(limit)
    if granted := granted_memory(cpus(environment, cgroup), environment):
        limits.append(granted)
    return min(limits)


def oom_kills(cgroup: Path = _CGROUP) -> int:
    """Return how many processes of this cgroup the kernel has killed for lack of memory; 0 if it does not say."""
    for directory in cgroup_directories(cgroup):
        for name in ("memory.events", "memory.oom_control", "memory/memory.oom_control"):
            with suppress(OSError):
                counts = dict(line.split() for line in (directory / name).read_text().splitlines())
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
    return 0


def cgroup_directories(cgroup: Path = _CGROUP, own: Path = _OWN_CGROUP) -> list[Path]:
    """Return the directories of this process's cgroup (version 2) and of its ancestors, up to the root.

    Args:
        cgroup: Where the cgroup file system is mounted.
        own: The file that names this process's cgroup.
    """
    try:
        name = next(line[4:] for line in own.read_text().splitlines() if line.startswith("0::/"))
    except (OSError, StopIteration):
        return [cgroup]
    path = cgroup / name
    return [path, *(parent for parent in path.parents if parent.is_relative_to(cgroup))]
