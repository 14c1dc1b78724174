"""The CPUs and memory that a process may use, by its cgroups, Slurm and the kernel."""

import os
from pathlib import Path

from batchvl.hardware.limits import MIB, cgroup_directories, cpus, memory

AFFINITY = len(os.sched_getaffinity(0))
NOWHERE = Path("/nowhere")


def test_cpus_are_the_minimum_of_all_limits(tmp_path):
    assert cpus({}, NOWHERE) == AFFINITY
    assert cpus({"SLURM_CPUS_PER_TASK": "1"}, NOWHERE) == 1
    assert cpus({"SLURM_CPUS_PER_TASK": str(AFFINITY + 5)}, NOWHERE) == AFFINITY
    assert cpus({"SLURM_CPUS_PER_TASK": "many"}, NOWHERE) == AFFINITY
    for text, expected in (("max 100000", AFFINITY), ("50000 100000", 1), ("nonsense", AFFINITY)):
        (tmp_path / "cpu.max").write_text(text)
        assert cpus({}, tmp_path) == expected


def test_memory_is_the_minimum_of_all_limits(tmp_path):
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory({}, NOWHERE) == host
    assert memory({"SLURM_MEM_PER_NODE": "100"}, NOWHERE) == 100 * MIB
    assert memory({"SLURM_MEM_PER_CPU": "10", "SLURM_CPUS_PER_TASK": "1"}, NOWHERE) == 10 * MIB
    assert memory({"SLURM_MEM_PER_NODE": "0"}, NOWHERE) == host, "0 means all of the node's memory"
    for text, expected in (("max", host), (str(64 * MIB), 64 * MIB), (str(2**62), host)):
        (tmp_path / "memory.max").write_text(text)
        assert memory({}, tmp_path) == expected
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(str(32 * MIB))
    assert memory({}, tmp_path) == 32 * MIB, "cgroup version 1, as in older containers"


def test_the_process_s_own_cgroup_and_its_ancestors(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_7/step_0\n")
    root = Path("/cgroup")
    expected = [root / "slurm/job_7/step_0", root / "slurm/job_7", root / "slurm", root]
    assert cgroup_directories(root, own) == expected
    own.write_text("12:memory:/docker/abc\n")
    assert cgroup_directories(root, own) == [root]
    assert cgroup_directories(root, NOWHERE) == [root]
