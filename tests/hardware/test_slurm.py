"""What Slurm's environment variables and commands say about the job that a process runs in."""

import pytest

from batchvl.hardware.slurm import MIB, SlurmJob, current_job, granted_memory, kill_wait, sbatch_version


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that installs a shell script as a program, on a PATH without other programs."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/nowhere")

    def make(name, script):
        (tmp_path / name).write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
        (tmp_path / name).chmod(0o755)

    return make


def test_the_current_job():
    assert current_job({}) is None
    assert current_job({"SLURM_JOB_ID": "7"}) == SlurmJob("7", None, None, None, 0)
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "8", "SLURM_CPUS_ON_NODE": "16", "SLURM_MEM_PER_NODE": "65536"}
    assert current_job({**job, "SLURM_STEP_GPUS": "3", "SLURM_JOB_GPUS": "0,3"}) == SlurmJob(
        "12", 8, 65536 * MIB, None, 1
    ), "a step's GPUs count before the job's"
    task = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_ON_NODE": "4"}
    assert current_job({**task, "SLURM_MEM_PER_CPU": "2048", "SLURM_GPUS_ON_NODE": "2"}) == SlurmJob(
        "12_5", 4, None, 2048 * MIB, 2
    )


def test_granted_memory():
    assert granted_memory(4, {}) is None
    assert granted_memory(4, {"SLURM_MEM_PER_NODE": "100", "SLURM_MEM_PER_CPU": "10"}) == 100 * MIB
    assert granted_memory(4, {"SLURM_MEM_PER_NODE": "0", "SLURM_MEM_PER_CPU": "10"}) == 40 * MIB


def test_kill_wait(program):
    job = {"SLURM_JOB_ID": "7"}
    assert kill_wait(job) is None, "no scontrol"
    program("scontrol", "echo 'KillOnBadExit           = 0'; echo 'KillWait                = 30 sec'")
    assert kill_wait(job) == 30
    assert kill_wait({}) is None, "outside of a job"
    program("scontrol", "echo 'slurm_load_ctl_conf error: Unable to contact slurm controller'; exit 1")
    assert kill_wait(job) is None


def test_sbatch_version(program):
    with pytest.raises(FileNotFoundError):
        sbatch_version()
    program("sbatch", "echo warning; echo slurm 24.05.2; echo")
    assert sbatch_version() == (0, "slurm 24.05.2")
