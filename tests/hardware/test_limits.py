"""What of a machine is ours, by its cgroups, by Slurm and by the kernel."""

import os
from pathlib import Path

from batchvl.hardware.limits import MIB, _groups, cpus, memory

MINE = len(os.sched_getaffinity(0))
NOWHERE = Path("/nowhere")


def test_cpus_are_the_least_of_what_is_granted(tmp_path):
    assert cpus({}, NOWHERE) == MINE
    assert cpus({"SLURM_CPUS_PER_TASK": "1"}, NOWHERE) == 1
    assert cpus({"SLURM_CPUS_PER_TASK": str(MINE + 5)}, NOWHERE) == MINE
    assert cpus({"SLURM_CPUS_PER_TASK": "many"}, NOWHERE) == MINE
    for text, found in (("max 100000", MINE), ("50000 100000", 1), ("nonsense", MINE)):
        (tmp_path / "cpu.max").write_text(text)
        assert cpus({}, tmp_path) == found


def test_memory_is_the_least_of_what_is_granted(tmp_path):
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert memory({}, NOWHERE) == host
    assert memory({"SLURM_MEM_PER_NODE": "100"}, NOWHERE) == 100 * MIB
    assert memory({"SLURM_MEM_PER_CPU": "10", "SLURM_CPUS_PER_TASK": "1"}, NOWHERE) == 10 * MIB
    assert memory({"SLURM_MEM_PER_NODE": "0"}, NOWHERE) == host, "0 is all of the node"
    for text, found in (("max", host), (str(64 * MIB), 64 * MIB), (str(2**62), host)):
        (tmp_path / "memory.max").write_text(text)
        assert memory({}, tmp_path) == found
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text(str(32 * MIB))
    assert memory({}, tmp_path) == 32 * MIB, "version 1, as in older containers"


def test_the_process_s_own_cgroup_and_those_above_it(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/slurm/job_7/step_0\n")
    root = Path("/cgroup")
    wanted = [root / "slurm/job_7/step_0", root / "slurm/job_7", root / "slurm", root]
    assert _groups(root, own) == wanted
    own.write_text("12:memory:/docker/abc\n")
    assert _groups(root, own) == [root]
    assert _groups(root, NOWHERE) == [root]
