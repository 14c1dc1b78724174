"""Check Python, CPUs, memory, disk, limits and Slurm."""

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
from ..hardware import limits, slurm
from .finding import GIB, Finding, format_size

MIN_OPEN_FILES = 4096
"""Limit on open files below which many concurrent fetches may fail."""
MIN_FREE_MEMORY = 4 * GIB
MIN_FREE_DISK = 5 * GIB


def check_python() -> Finding:
    """Report the version and path of Python, and batchvl's version."""
    path = sys.executable.replace(os.path.expanduser("~") + os.sep, "~/")
    return Finding("ok", "Python", f"{sys.version.split()[0]}, {path}; batchvl {__version__}")


def check_cpus() -> Finding:
    """Check that there is more than one usable CPU."""
    usable, total = limits.cpus(), os.cpu_count() or 1
    text = f"{usable} usable" if usable == total else f"{usable} usable of {total} on this host"
    if usable < 2:
        advice = "images are prepared on CPUs, and one CPU cannot keep a GPU busy; in Slurm: --cpus-per-task=8"
        return Finding("warn", "CPUs", text, advice)
    return Finding("ok", "CPUs", text)


def check_memory() -> Finding:
    """Check the free memory, and report how much of the host's this process may use."""
    usable = limits.memory()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{format_size(usable)} usable" + (f" of {format_size(total)} on this host" if usable < 0.99 * total else "")
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    free = min(usable, int(match[1]) * 1024) if match else usable
    if match:
        text += f", {format_size(free)} free"
    if free < MIN_FREE_MEMORY:
        return Finding("warn", "memory", text, "too little for most models; in Slurm: --mem=32G")
    return Finding("ok", "memory", text)


def check_disk() -> Finding:
    """Check the current directory, where results usually go: by default, next to the manifest."""
    try:
        free = shutil.disk_usage(".").free
        writable = os.access(".", os.W_OK)
    except OSError as error:
        text = f"cannot read the current directory: {error.strerror}"
        return Finding("warn", "disk", text, "change to another directory")
    if not writable:
        text = "the current directory is not writable"
        return Finding("warn", "disk", text, "write the output elsewhere: -o DIR")
    text = f"{format_size(free)} free in the current directory"
    if free < MIN_FREE_DISK:
        advice = "write the output elsewhere: -o DIR; store models elsewhere: export HF_HOME=DIR"
        return Finding("warn", "disk", text, advice)
    return Finding("ok", "disk", text)


def check_open_files() -> Finding:
    """Check the limit on open files."""
    soft, hard = (
        2**20 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    text = f"{soft:,} allowed" + (f" (hard limit {hard:,})" if hard != soft else "")
    if soft >= MIN_OPEN_FILES:
        return Finding("ok", "open files", text)
    if hard >= MIN_OPEN_FILES:
        advice = f"many concurrent fetches may fail:\n  ulimit -n {min(hard, 65536)}"
        return Finding("warn", "open files", text, advice)
    advice = "ask the administrator to raise it (limits.conf: nofile); for a container: --ulimit nofile=65536"
    return Finding("warn", "open files", text, advice)


def check_shared_memory() -> Finding:
    """Check that memfd works: processes share images through it."""
    try:
        fd = os.memfd_create("batchvl-doctor")
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as view:
                view[:2] = b"ok"
        finally:
            os.close(fd)
    except (AttributeError, OSError) as error:
        reason = getattr(error, "strerror", None) or "not supported by this system"
        advice = "use Linux, and a sandbox that allows memfd_create"
        return Finding("missing", "shared memory", f"memfd: {reason}", advice)
    return Finding("ok", "shared memory", "memfd works")


def check_slurm(environment: Mapping[str, str] = os.environ) -> Finding:
    """Report the resources of the current job, or else whether jobs can be submitted from here."""
    if job := slurm.current_job(environment):
        resources = [
            f"{job.cpus} CPUs" if job.cpus else "",
            format_size(job.memory_per_node) if job.memory_per_node else "",
            f"{format_size(job.memory_per_cpu)} per CPU" if job.memory_per_cpu else "",
            f"{job.gpus or 'no'} GPU{'s' * (job.gpus != 1)}",
        ]
        return Finding("ok", "Slurm", f"in job {job.id}: {', '.join(filter(None, resources))}")
    try:
        code, version = slurm.sbatch_version()
    except FileNotFoundError:
        return Finding("ok", "Slurm", "not installed; only needed on clusters")
    except OSError as error:
        return Finding("warn", "Slurm", f"cannot run sbatch: {error}", "jobs cannot be submitted from here now")
    if code:
        advice = "if this is a cluster, name its configuration file:\n  export SLURM_CONF=/etc/slurm/slurm.conf"
        return Finding("warn", "Slurm", version or f"sbatch --version: exit code {code}", advice)
    return Finding("ok", "Slurm", f"sbatch is {version}; not inside a job")
