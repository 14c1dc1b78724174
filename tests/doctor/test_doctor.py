"""`batchvl doctor`: each check on simulated machines (programs on PATH, packages on PYTHONPATH), then on this one."""

import functools
import json
import os
import pty
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from batchvl.doctor.finding import Finding
from batchvl.doctor.gpus import check_gpus
from batchvl.doctor.libraries import check_lmdeploy, check_torch, check_turbomind, verdict
from batchvl.doctor.machine import check_slurm
from batchvl.engines.probe import Facts, Probe
from batchvl.engines.registry import LIBRARIES
from batchvl.hardware.gpus import DriverHangs, list_gpus

from ..hardware.driver import install_driver

ONE = "gpu GPU-aaaa 143771 143160 0 NVIDIA H200"
TWO = f"{ONE}\ngpu GPU-bbbb 143771 12288 0 NVIDIA H200"
MIG = "gpu GPU-aaaa 81559 80000 1 NVIDIA H100 80GB HBM3"
SLICES = "slice 0 3g.40gb\nslice 0 3g.40gb"


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Return a function that installs a shell script as a program, on a PATH without other programs."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:/nowhere")

    def make(name, script):
        (directory / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{script}\n")
        (directory / name).chmod(0o755)

    return make


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Return the directory of the simulated driver's library."""
    return tmp_path_factory.mktemp("nvml")


@pytest.fixture
def driver(library, monkeypatch, program):
    """Return a function that simulates an NVIDIA driver with the given facts."""
    return functools.partial(install_driver, library, monkeypatch)


@pytest.fixture
def package(tmp_path):
    """Return a function that writes packages and returns an environment in which they hide the real ones."""

    def make(**sources):
        for name, source in sources.items():
            directory = tmp_path / "packages" / name
            directory.mkdir(parents=True)
            (directory / "__init__.py").write_text(source)
        return {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}

    return make


def doctor(*arguments, **settings):
    command = [sys.executable, "-m", "batchvl", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def test_a_gpu_is_reported_with_its_free_memory(driver):
    driver(ONE)
    finding, usable = check_gpus({})
    assert finding == Finding("ok", "GPU", "NVIDIA H200, driver 580.159.03, 140 GiB of 140 GiB free")
    assert usable


def test_a_gpu_in_use_is_reported_with_its_users_and_the_idle_gpus(driver):
    driver(TWO, "user 1 4242 /opt/env/bin/python3 -m train", "user 1 17 ?")
    finding, _ = check_gpus({})
    assert finding.level == "warn"
    assert finding.found.startswith(
        "2 x NVIDIA H200, driver 580.159.03, 140 GiB of 140 GiB free; GPU 1 has 12 GiB free"
    )
    assert "in use by python3 (pid 4242), a process (pid 17)" in finding.found
    assert finding.advice.endswith("\n  export CUDA_VISIBLE_DEVICES=0")
    finding, _ = check_gpus({"CUDA_VISIBLE_DEVICES": "1"})
    assert "selects 1 of 2; in use by python3" in finding.found
    assert "wait" in finding.advice


@pytest.mark.parametrize(
    ("variable", "level", "text"),
    [
        ("0", "ok", "CUDA_VISIBLE_DEVICES=0 selects 1 of 2"),
        ("GPU-aa", "ok", "selects 1 of 2"),
        ("0,9,1", "ok", "selects 1 of 2"),  # entries after one that names no GPU are ignored
        ("", "warn", "2 x NVIDIA H200, hidden by CUDA_VISIBLE_DEVICES=''"),
        ("-1", "warn", "hidden by CUDA_VISIBLE_DEVICES='-1'"),
        ("7", "warn", "hidden by CUDA_VISIBLE_DEVICES='7'"),
    ],
)
def test_cuda_visible_devices(driver, variable, level, text):
    driver(TWO)
    finding, usable = check_gpus({"CUDA_VISIBLE_DEVICES": variable})
    assert (finding.level, usable) == (level, level == "ok")
    assert text in finding.found


def test_mig(driver):
    driver(MIG, SLICES)
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "MIG-2222"}):
        finding, usable = check_gpus(environment)
        assert usable
        assert finding.level == "ok"
        assert "NVIDIA H100 80GB HBM3, driver 580.159.03, MIG instances 2 x 3g.40gb" in finding.found
    driver(MIG)
    finding, _ = check_gpus({})
    assert finding.level == "warn"
    assert "no MIG instance is available" in finding.found


def test_unknown_amounts_of_memory_are_left_out(driver):
    driver("gpu GPU-aaaa -1 -1 -1 NVIDIA GB10")
    assert check_gpus({})[0] == Finding("ok", "GPU", "NVIDIA GB10, driver 580.159.03")


@pytest.mark.parametrize(
    ("facts", "text", "advice"),
    [
        (["init 9"], "Driver Not Loaded", "run on the CPU"),
        (["init 18"], "version mismatch", "restart"),
        ([], "found no GPU", "run on the CPU"),
        ([ONE, "lost 0"], "GPU 0 cannot be used: GPU is lost", "run on the CPU"),
    ],
)
def test_the_error_of_a_broken_driver_is_quoted(driver, facts, text, advice):
    driver(*facts)
    finding, usable = check_gpus({})
    assert (finding.level, usable) == ("missing", False)
    assert text in finding.found
    assert advice in finding.advice


def test_a_lost_gpu_does_not_hide_the_others(driver):
    driver(TWO, "lost 0")
    assert [gpu.index for gpu in list_gpus()] == [1]


def test_without_a_driver(program):
    finding, usable = check_gpus({"SLURM_JOB_ID": "7"})
    if "device files exist" in finding.found:
        pytest.skip("this machine has an NVIDIA driver")
    assert (finding.level, usable) == ("missing", False)
    assert "--gres=gpu:1" in finding.advice
    program("srun", "")
    assert "\n  srun --gres=gpu:1 batchvl doctor" in check_gpus({})[0].advice


def test_a_driver_that_hangs_is_given_up(driver, tmp_path):
    driver(f"hang {tmp_path}/pid")
    began = time.monotonic()
    with pytest.raises(DriverHangs, match="did not answer within 2 s"):
        list_gpus(2)
    assert time.monotonic() - began < 20
    assert gone((tmp_path / "pid").read_text())


def gone(pid):
    """Wait for a process to end, and return whether it did (it may still be a zombie)."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_slurm(program):
    assert check_slurm({}).level == "ok"
    assert "not installed" in check_slurm({}).found
    program("sbatch", "echo slurm 24.05.2")
    assert check_slurm({}) == Finding("ok", "Slurm", "sbatch is slurm 24.05.2; not inside a job")
    program("sbatch", "echo 'sbatch: fatal: no configuration' >&2; exit 1")
    assert check_slurm({}).level == "warn"
    assert "sbatch: fatal: no configuration" in check_slurm({}).found
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "8", "SLURM_MEM_PER_NODE": "65536", "SLURM_JOB_GPUS": "0,3"}
    assert check_slurm(job).found == "in job 12: 8 CPUs, 64 GiB, 2 GPUs"
    task = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_ON_NODE": "4"}
    assert check_slurm(task).found == "in job 12_5: 4 CPUs, no GPUs"


@pytest.mark.parametrize(
    ("soft", "hard", "level", "advice"),
    [(4096, 4096, "ok", ""), (1024, 8192, "warn", "\n  ulimit -n 8192"), (512, 1024, "warn", "administrator")],
)
def test_the_limit_on_open_files(soft, hard, level, advice):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from batchvl.doctor.machine import check_open_files
found = check_open_files()
print(found.level, found.found, found.advice)
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{level} {soft:,} allowed")
    assert advice in output


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os; os.abort()", "is killed by SIGABRT"),
        (
            "import os; os.write(2, b'terminate called: no kernel\\n'); os.abort()",
            "is killed by SIGABRT: terminate called: no kernel",
        ),
        ("import os; os._exit(3)", "exits with 3"),
        ("import os; os._exit(0)", "exits with 0"),
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12: cannot open"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        (
            "import os; os.write(1, b'{}\\nno end')\nprint('noise', end='')\nraise ValueError",
            "ValueError: no reason given",
        ),
    ],
)
def test_a_failed_import_is_reported(package, source, words):
    facts = Probe("torch", package(torch=source)).facts(time.monotonic() + 60)
    assert facts.installed
    assert not facts.usable
    assert facts.error.removeprefix("a process that imports it ").startswith(words)


def test_an_import_that_hangs_is_killed_with_its_children(package, tmp_path):
    source = f"""
import subprocess, time
with open({str(tmp_path / "pid")!r}, "w") as file:
    file.write(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
    probe = Probe("torch", package(torch=source))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    facts = probe.facts(time.monotonic() + 0.1)
    assert facts.error == "importing it hangs"
    assert gone((tmp_path / "pid").read_text())


def test_a_driver_that_is_too_old_for_torch(package):
    source = """
__version__ = "2.12.1+cu130"
class version: cuda = "13.0"
def ones(*_, **__):
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update your driver")
"""
    facts = Probe("torch", package(torch=source)).facts(time.monotonic() + 60)
    finding = check_torch(facts, gpu=True)
    assert finding.level == "warn"
    assert "2.12.1+cu130 for CUDA 13.0, cannot use the GPU: The NVIDIA driver" in finding.found
    assert finding.found.endswith("is too old (found version 12020)")
    assert "update the driver" in finding.advice
    assert check_torch(Facts(version="2.13.0+cpu"), gpu=True).level == "warn", "a CPU build on a machine with a GPU"
    assert check_torch(Facts(version="2.13.0+cpu"), gpu=False).level == "ok"


def test_supported_versions_are_those_of_pyproject():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {line.split(";")[0] for line in (*extras["lmdeploy"], *extras["transformers"])}
    examined = {f"{name}{library.versions}" for name, library in LIBRARIES.items() if library.versions}
    assert wanted - examined == {"pyelftools>=0.31"}, "which explains why others do not load"
    assert examined <= wanted
    assert check_lmdeploy(Facts(version="0.18.3"), gpu=True).level == "ok"
    for version in ("0.17.9", "0.19.0"):
        finding = check_lmdeploy(Facts(version=version), gpu=True)
        assert finding == Finding(
            "warn", "LMDeploy", f"{version}; batchvl supports >=0.18,<0.19", "  pip install 'batchvl[lmdeploy]'"
        )


def test_turbomind_advice_depends_on_the_gpu():
    broken = Facts(error="found no libcublas.so.12 (nvidia-cublas-cu12)", advice="pip install nvidia-cublas-cu12")
    for gpu in (True, False):
        finding = check_turbomind(broken, Facts(version="0.18.0"), gpu)
        assert (finding.level, finding.found) == ("missing", broken.error)
        assert finding.advice.endswith("\n  pip install nvidia-cublas-cu12")
        assert ("requires a GPU" in finding.advice) != gpu
    assert check_turbomind(Facts(), Facts(version="0.18.0"), True).level == "ok"
    assert check_turbomind(Facts(installed=False), Facts(installed=False), True).level == "missing"


def test_the_verdict_is_based_on_probes_not_on_installed_packages(monkeypatch):
    fine = {name: Facts(version="9") for name in ("torch", "transformers", "lmdeploy", "turbomind")}
    memory = Finding("ok", "shared memory", "memfd works")
    monkeypatch.setattr("batchvl.doctor.libraries.choose_engine", lambda name: "lmdeploy")
    gpu = {**fine, "torch": Facts(version="9", gpus=("NVIDIA H200",))}
    good = verdict(gpu, memory)
    assert (good.level, good.engine) == ("ok", "lmdeploy")
    assert good.found == "uses the engine lmdeploy on the GPU, with TurboMind"
    slow = verdict({**gpu, "turbomind": Facts(error="no")}, memory)
    assert (slow.level, slow.found) == ("ok", "uses the engine lmdeploy on the GPU, with its PyTorch backend")
    for facts in (fine, {**gpu, "lmdeploy": Facts(error="no")}):
        other = verdict(facts, memory)
        assert other.level == "warn"
        assert "\n  batchvl run --engine transformers MANIFEST" in other.advice
    nothing = verdict({**gpu, "torch": Facts(error="no")}, memory)
    assert nothing.level == "missing"
    assert "torch cannot be used" in nothing.found
    assert verdict(gpu, Finding("missing", "shared memory", "none")).level == "missing"


def test_commands_are_not_wrapped():
    command = "export LD_LIBRARY_PATH=" + "/a/rather/long/path:" * 5 + " && pip install a"
    lines = str(Finding("warn", "x", "word " * 40, f"{'why ' * 40}\n  {command}")).splitlines()
    assert command in lines[-1]
    assert all(len(line) <= 110 for line in lines[:-1])
    assert sum("-> " in line for line in lines) == 1


def test_the_screen_of_this_environment():
    done = doctor(env={**os.environ, "PATH": "/nowhere"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 100
    assert "\x1b" not in done.stdout
    assert re.search(r"^ok +torch +\d", done.stdout, re.MULTILINE)
    assert re.search(r"^(ok|warn) +batchvl run +", done.stdout, re.MULTILINE)


def test_colours_on_a_terminal():
    main, child = pty.openpty()
    code = "from click import echo; from batchvl.doctor import Finding; echo(str(Finding('ok', 'x', 'y')))"
    subprocess.run([sys.executable, "-c", code], stdout=child, check=True)
    os.close(child)
    assert b"\x1b[32mok" in os.read(main, 1000)
    os.close(main)


def test_a_broken_library_leads_to_exit_code_2(package):
    environment = package(torch="import os; os.abort()", transformers="", lmdeploy="import torch")
    done = doctor(env=environment)
    assert done.returncode == 2
    assert re.search(r"missing +torch .*SIGABRT", done.stdout)
    assert re.search(r"missing +batchvl run .*torch.* cannot be used", done.stdout)
    assert "Traceback" not in done.stderr


def test_a_library_that_hangs(package):
    done = doctor("--timeout", "2", "--json", env=package(torch="import time; time.sleep(60)"))
    report = json.loads(done.stdout)
    assert (done.returncode, report["works"], report["engine"]) == (2, False, None)
    [finding] = [finding for finding in report["findings"] if finding["what"] == "torch"]
    assert (finding["level"], finding["found"]) == ("missing", "importing it hangs")
    assert "--timeout" in finding["advice"]


def test_an_environment_without_engines(tmp_path):
    hidden = "import sys\nfor name in ('torch', 'transformers', 'lmdeploy'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = doctor(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert re.search(r"missing +torch +not installed\n +-> pip install 'batchvl\[transformers\]'", done.stdout)
    assert re.search(r"missing +batchvl run +no engine can run here", done.stdout)
    assert "pip install 'batchvl[transformers]'" in done.stdout.split("batchvl run")[1]


def test_help_lists_the_exit_codes():
    assert "  0  an engine can run\n  1  any other error\n  2  no engine can run\n" in doctor("--help").stdout
