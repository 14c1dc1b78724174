"""The Slurm job that this process runs in: its resources, and how Slurm ends it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from .commands import run_command

MIB = 2**20
_SCONTROL_SECONDS = 5.0
_SBATCH_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """A job's resources on this node, as far as Slurm's environment variables name them."""

    id: str
    """The job's number; for a task of a job array, the array's number and the task's, such as 12_5."""
    cpus: int | None
    memory_per_node: int | None
    """Bytes. None if the job was not given an amount per node, or was given all of it."""
    memory_per_cpu: int | None
    """Bytes."""
    gpus: int


def current_job(environment: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the job that this process runs in, or None outside of a job.

    >>> current_job({"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "8", "SLURM_JOB_GPUS": "0,3"})
    SlurmJob(id='7', cpus=8, memory_per_node=None, memory_per_cpu=None, gpus=2)
    """
    job = environment.get("SLURM_JOB_ID")
    if not job:
        return None
    if array := environment.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{environment.get('SLURM_ARRAY_TASK_ID', '?')}"
    indices = environment.get("SLURM_STEP_GPUS") or environment.get("SLURM_JOB_GPUS")
    return SlurmJob(
        id=job,
        cpus=cpus_per_task(environment) or _number(environment, "SLURM_CPUS_ON_NODE"),
        memory_per_node=_megabytes(environment, "SLURM_MEM_PER_NODE"),
        memory_per_cpu=_megabytes(environment, "SLURM_MEM_PER_CPU"),
        gpus=len(indices.split(",")) if indices else _number(environment, "SLURM_GPUS_ON_NODE") or 0,
    )


def cpus_per_task(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of CPUs that Slurm granted to each task, or None if it named none."""
    return _number(environment, "SLURM_CPUS_PER_TASK")


def granted_memory(cpus: int, environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the bytes of memory that Slurm granted on this node, or None if it named no amount.

    Args:
        cpus: Number of CPUs to count if the grant is per CPU.
        environment: Environment variables.
    """
    if per_node := _megabytes(environment, "SLURM_MEM_PER_NODE"):
        return per_node
    if per_cpu := _megabytes(environment, "SLURM_MEM_PER_CPU"):
        return per_cpu * cpus
    return None


def kill_wait(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds between the SIGTERM and the SIGKILL that end a job (Slurm's setting KillWait).

    None outside of a job, or if the setting cannot be read.
    """
    if "SLURM_JOB_ID" not in environment:
        return None
    try:
        output = run_command(["scontrol", "show", "config"], _SCONTROL_SECONDS)[1]
    except OSError:  # not installed, or no answer in time
        return None
    match = re.search(r"^KillWait\s*=\s*(\d+) sec$", output, re.MULTILINE)
    return float(match[1]) if match else None


def sbatch_version() -> tuple[int, str]:
    """Run `sbatch --version` and return its exit code and the last line of its output, such as "slurm 24.05.2".

    Raises:
        FileNotFoundError: Slurm is not installed here.
        OSError: sbatch cannot be started, or does not answer (TimeoutError).
    """
    code, output = run_command(["sbatch", "--version"], _SBATCH_SECONDS)
    return code, next((line for line in reversed(output.splitlines()) if line.strip()), "")


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    return int(text) if text.isdecimal() else None


def _megabytes(environment: Mapping[str, str], name: str) -> int | None:
    """Return an amount of memory in bytes. Slurm counts in MiB, and writes 0 for all of a node's memory."""
    number = _number(environment, name)
    return number * MIB if number else None
