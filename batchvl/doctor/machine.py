"""The machine and what of it is ours, GPUs aside."""

from __future__ import annotations

import mmap
import os
import re
import resource
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from .._version import __version__
from ..hardware import limits as resources
from ..hardware.commands import run_command
from .finding import GIB, Finding, size

FILES = 4096
"""Fewer files that may be open are too few for many fetches at once."""


def python() -> Finding:
    where = sys.executable.replace(os.path.expanduser("~") + os.sep, "~/")
    return Finding("ok", "Python", f"{sys.version.split()[0]}, {where}; batchvl {__version__}")


def processors() -> Finding:
    ours, all_ = resources.cpus(), os.cpu_count() or 1
    found = f"{ours} usable" if ours == all_ else f"{ours} usable of this host's {all_}"
    if ours < 2:
        advice = "pictures are prepared on CPUs, and one keeps no GPU busy; in Slurm: --cpus-per-task=8"
        return Finding("warn", "CPUs", found, advice)
    return Finding("ok", "CPUs", found)


def memory() -> Finding:
    granted = resources.memory()
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = f"{size(granted)} usable" + (f" of this host's {size(host)}" if granted < 0.99 * host else "")
    try:
        line = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        line = None
    free = min(granted, int(line[1]) * 1024) if line else granted
    if line:
        found += f", {size(free)} free"
    if free < 4 * GIB:
        return Finding("warn", "memory", found, "too little for most models; in Slurm, --mem=32G")
    return Finding("ok", "memory", found)


def disk() -> Finding:
    """Of the current folder, where a manifest's results go unless told otherwise."""
    try:
        free = shutil.disk_usage(".").free
        writable = os.access(".", os.W_OK)
    except OSError as error:
        return Finding("warn", "disk", f"the current folder cannot be read: {error.strerror}", "cd to another")
    if not writable:
        return Finding("warn", "disk", "the current folder cannot be written", "put the output elsewhere: -o DIR")
    found = f"{size(free)} free in the current folder"
    if free < 5 * GIB:
        return Finding("warn", "disk", found, "put the output elsewhere: -o DIR; models: export HF_HOME=DIR")
    return Finding("ok", "disk", found)


def open_files() -> Finding:
    soft, hard = (
        2**20 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    found = f"{soft:,} may be open" + (f", {hard:,} at most" if hard != soft else "")
    if soft >= FILES:
        return Finding("ok", "open files", found)
    if hard >= FILES:
        return Finding("warn", "open files", found, f"many fetches at once may fail:\n  ulimit -n {min(hard, 65536)}")
    advice = "ask the administrator for more (limits.conf: nofile); a container: --ulimit nofile=65536"
    return Finding("warn", "open files", found, advice)


def shared_memory() -> Finding:
    """Pictures cross processes in a memfd."""
    try:
        fd = os.memfd_create("batchvl-doctor")
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as view:
                view[:2] = b"ok"
        finally:
            os.close(fd)
    except (AttributeError, OSError) as error:
        why = getattr(error, "strerror", None) or "this system has none"
        return Finding(
            "missing", "shared memory", f"memfd: {why}", "needs Linux, and a sandbox that allows memfd_create"
        )
    return Finding("ok", "shared memory", "memfd works")


def slurm(environment: Mapping[str, str] = os.environ) -> Finding:
    """Inside a job what was granted, else whether jobs can be handed in."""
    if job := environment.get("SLURM_JOB_ID"):
        if array := environment.get("SLURM_ARRAY_JOB_ID"):
            job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '?')}"
        cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE", "?")
        mib = environment.get("SLURM_MEM_PER_NODE", "")
        granted = [f"{cpus} CPUs", size(int(mib) * 2**20) if mib.isdigit() and int(mib) else ""]
        if mib := environment.get("SLURM_MEM_PER_CPU", ""):
            granted.append(f"{mib} MiB a CPU")
        names = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS")
        count = len(names.split(",")) if names else environment.get("SLURM_GPUS_ON_NODE", "no")
        granted.append(f"{count} GPU{'' if str(count) == '1' else 's'}")
        return Finding("ok", "Slurm", f"in job {job}: {', '.join(filter(None, granted))}")
    try:
        code, said = run_command(["sbatch", "--version"], 15)
    except FileNotFoundError:
        return Finding("ok", "Slurm", "none here; batchvl needs it for clusters only")
    except OSError as error:
        return Finding("warn", "Slurm", f"sbatch does not answer: {error}", "jobs cannot be handed in from here now")
    words = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if code:
        advice = "if there is a cluster, say where its configuration is:\n  export SLURM_CONF=/etc/slurm/slurm.conf"
        return Finding("warn", "Slurm", words or f"sbatch --version ends with {code}", advice)
    return Finding("ok", "Slurm", f"sbatch of {words}; this is not a job")
