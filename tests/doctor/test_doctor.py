"""`batchvl doctor`: each check on machines faked by programs on PATH and packages on PYTHONPATH, then on this one."""

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
from batchvl.doctor.gpus import graphics
from batchvl.doctor.libraries import SUPPORTED, lmdeploy, torch, turbomind, verdict
from batchvl.doctor.machine import slurm
from batchvl.engines.probe import Facts, Probe
from batchvl.hardware.gpus import NoAnswer, gpus

ONE = "0, GPU-aaaa, NVIDIA H200, 580.159.03, 143771, 143160, Disabled"
TWO = f"{ONE}\n1, GPU-bbbb, NVIDIA H200, 580.159.03, 143771, 12288, Disabled"
MIG = "0, GPU-aaaa, NVIDIA H100 80GB HBM3, 550.54.15, 81559, 80000, Enabled"
SLICES = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-1111)
  MIG 3g.40gb     Device  1: (UUID: MIG-2222)"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script first on PATH. The rest of PATH has no program of the kinds that are looked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/nowhere")

    def make(name, script):
        (folder / name).write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{script}\n")
        (folder / name).chmod(0o755)

    return make


@pytest.fixture
def smi(program):
    """An nvidia-smi that answers its three questions."""

    def make(listed, users="", slices=""):
        cases = f"*query-gpu*) cat <<'X'\n{listed}\nX\n;; *compute-apps*) cat <<'X'\n{users}\nX\n;;"
        program("nvidia-smi", f"case \"$*\" in {cases} -L) cat <<'X'\n{slices}\nX\n;; *) exit 3;; esac")

    return make


@pytest.fixture
def package(tmp_path):
    """Makes packages that are found before the real ones, and gives the environment in which they are."""

    def make(**sources):
        for name, source in sources.items():
            folder = tmp_path / "packages" / name
            folder.mkdir(parents=True)
            (folder / "__init__.py").write_text(source)
        return {**os.environ, "PYTHONPATH": str(tmp_path / "packages")}

    return make


def doctor(*arguments, **settings):
    command = [sys.executable, "-m", "batchvl", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **settings)


def test_a_gpu_is_told_with_its_free_memory(smi):
    smi(ONE)
    finding, there = graphics({})
    assert finding == Finding("ok", "GPU", "NVIDIA H200, driver 580.159.03, 140 GiB of 140 GiB free")
    assert there


def test_a_gpu_in_use_names_who_uses_it_and_the_others(smi):
    smi(TWO, "GPU-bbbb, 4242, /opt/env/bin/python3\nGPU-bbbb, 17, [Not Found]")
    finding, _ = graphics({})
    assert finding.level == "warn"
    assert finding.found.startswith(
        "2 x NVIDIA H200, driver 580.159.03, 140 GiB of 140 GiB free; GPU 1 has 12 GiB free"
    )
    assert "in use by python3 (pid 4242), a process (pid 17)" in finding.found
    assert finding.advice.endswith("\n  export CUDA_VISIBLE_DEVICES=0")
    finding, _ = graphics({"CUDA_VISIBLE_DEVICES": "1"})
    assert "leaves these of 2; in use by python3" in finding.found
    assert "wait" in finding.advice


@pytest.mark.parametrize(
    ("told", "level", "words"),
    [
        ("0", "ok", "CUDA_VISIBLE_DEVICES=0 leaves these of 2"),
        ("GPU-aa", "ok", "leaves these of 2"),
        ("0,9,1", "ok", "leaves these of 2"),  # what follows a name of no GPU does not count
        ("", "warn", "2 x NVIDIA H200 here, hidden by CUDA_VISIBLE_DEVICES=''"),
        ("-1", "warn", "hidden by CUDA_VISIBLE_DEVICES='-1'"),
        ("7", "warn", "hidden by CUDA_VISIBLE_DEVICES='7'"),
    ],
)
def test_gpus_that_are_hidden(smi, told, level, words):
    smi(TWO)
    finding, there = graphics({"CUDA_VISIBLE_DEVICES": told})
    assert (finding.level, there) == (level, level == "ok")
    assert words in finding.found


def test_mig(smi):
    smi(MIG, slices=SLICES)
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": "MIG-2222"}):
        finding, there = graphics(environment)
        assert there
        assert finding.level == "ok"
        assert "NVIDIA H100 80GB HBM3, driver 550.54.15, MIG slices 2 x 3g.40gb" in finding.found
    smi(MIG, slices=SLICES.splitlines()[0])
    finding, _ = graphics({})
    assert finding.level == "warn"
    assert "no slice of it" in finding.found


def test_what_the_driver_does_not_tell_is_left_out(smi):
    smi("0, GPU-aaaa, NVIDIA GB10, 580.95.05, [N/A], [N/A], [N/A]")
    assert graphics({})[0] == Finding("ok", "GPU", "NVIDIA GB10, driver 580.95.05")


@pytest.mark.parametrize(
    ("said", "code", "advice"),
    [
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, "run on the CPU"),
        ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 580.95", 18, "restart"),
        ("No devices were found", 6, "run on the CPU"),
    ],
)
def test_a_driver_that_does_not_work_is_quoted(program, said, code, advice):
    program("nvidia-smi", f'echo "{said}"; exit {code}')
    finding, there = graphics({})
    assert (finding.level, there) == ("missing", False)
    assert said.split("\n")[0] in finding.found
    assert advice in finding.advice


def test_no_driver_and_where_to_look(program):
    finding, there = graphics({"SLURM_JOB_ID": "7"})
    if "devices are" in finding.found:
        pytest.skip("this machine has a driver")
    assert (finding.level, there) == ("missing", False)
    assert "--gres=gpu:1" in finding.advice
    program("srun", "")
    assert "\n  srun --gres=gpu:1 batchvl doctor" in graphics({})[0].advice


def test_an_nvidia_smi_that_hangs_is_not_waited_for(program, tmp_path):
    program("nvidia-smi", f"sleep 60 & echo $! >{tmp_path}/pid; wait")
    began = time.monotonic()
    with pytest.raises(NoAnswer, match=r"did not answer within 0\.5 s"):
        gpus(0.5)
    assert time.monotonic() - began < 5
    assert gone((tmp_path / "pid").read_text())


def gone(pid):
    """Whether a process ends within a moment, or is there only to be reaped."""
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
    assert slurm({}).level == "ok"
    assert "none here" in slurm({}).found
    program("sbatch", "echo slurm 24.05.2")
    assert slurm({}) == Finding("ok", "Slurm", "sbatch of slurm 24.05.2; this is not a job")
    program("sbatch", "echo 'sbatch: fatal: no configuration' >&2; exit 1")
    assert slurm({}).level == "warn"
    assert "sbatch: fatal: no configuration" in slurm({}).found
    job = {"SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "8", "SLURM_MEM_PER_NODE": "65536", "SLURM_JOB_GPUS": "0,3"}
    assert slurm(job).found == "in job 12: 8 CPUs, 64 GiB, 2 GPUs"
    task = {"SLURM_JOB_ID": "13", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "5", "SLURM_CPUS_ON_NODE": "4"}
    assert slurm(task).found == "in job 12_5: 4 CPUs, no GPUs"


@pytest.mark.parametrize(
    ("soft", "hard", "level", "advice"),
    [(4096, 4096, "ok", ""), (1024, 8192, "warn", "\n  ulimit -n 8192"), (512, 1024, "warn", "administrator")],
)
def test_few_open_files(soft, hard, level, advice):
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
from batchvl.doctor.machine import open_files
found = open_files()
print(found.level, found.found, found.advice)
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{level} {soft:,} may be open")
    assert advice in said


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
def test_an_import_that_goes_wrong_is_told(package, source, words):
    facts = Probe("torch", package(torch=source)).facts(time.monotonic() + 60)
    assert facts.installed
    assert not facts.usable
    assert facts.error.removeprefix("a process that imports it ").startswith(words)


def test_an_import_that_hangs_is_ended_with_its_children(package, tmp_path):
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
    finding = torch(facts, gpu=True)
    assert finding.level == "warn"
    assert "2.12.1+cu130 for CUDA 13.0, computes on no GPU: The NVIDIA driver" in finding.found
    assert finding.found.endswith("is too old (found version 12020)")
    assert "update the driver" in finding.advice
    assert torch(Facts(version="2.13.0+cpu"), gpu=True).level == "warn", "there is a GPU, and this torch is blind to it"
    assert torch(Facts(version="2.13.0+cpu"), gpu=False).level == "ok"


def test_versions_are_those_that_pyproject_asks_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [line.split(";")[0] for line in (*extras["lmdeploy"], *extras["transformers"])]
    assert sorted(wanted) == sorted(f"{name}{version}" for name, version in SUPPORTED.items())
    assert lmdeploy(Facts(version="0.18.3"), gpu=True).level == "ok"
    for version in ("0.17.9", "0.19.0"):
        finding = lmdeploy(Facts(version=version), gpu=True)
        assert finding == Finding(
            "warn", "LMDeploy", f"{version}; batchvl is made for >=0.18,<0.19", "  pip install 'batchvl[lmdeploy]'"
        )


def test_turbomind_says_what_to_do_where_it_could_run():
    broken = Facts(error="found no libcublas.so.12 (nvidia-cublas-cu12)", advice="pip install nvidia-cublas-cu12")
    for gpu in (True, False):
        finding = turbomind(broken, Facts(version="0.18.0"), gpu)
        assert (finding.level, finding.found) == ("missing", broken.error)
        assert finding.advice.endswith("\n  pip install nvidia-cublas-cu12")
        assert ("needs a GPU" in finding.advice) != gpu
    assert turbomind(Facts(), Facts(version="0.18.0"), True).level == "ok"
    assert turbomind(Facts(installed=False), Facts(installed=False), True).level == "missing"


def test_the_verdict_follows_what_was_tried_not_what_is_installed(monkeypatch):
    fine = {name: Facts(version="9") for name in ("torch", "transformers", "lmdeploy", "turbomind")}
    memory = Finding("ok", "shared memory", "memfd works")
    monkeypatch.setattr("batchvl.doctor.libraries.registry.choose", lambda name: "lmdeploy")
    gpu = {**fine, "torch": Facts(version="9", gpus=("NVIDIA H200",))}
    good = verdict(gpu, memory)
    assert (good.level, good.engine) == ("ok", "lmdeploy")
    assert good.found == "takes the engine lmdeploy, on the GPU, by TurboMind"
    slow = verdict({**gpu, "turbomind": Facts(error="no")}, memory)
    assert (slow.level, slow.found) == ("ok", "takes the engine lmdeploy, on the GPU, by its PyTorch backend")
    for facts in (fine, {**gpu, "lmdeploy": Facts(error="no")}):
        other = verdict(facts, memory)
        assert other.level == "warn"
        assert "\n  batchvl run --engine transformers MANIFEST" in other.advice
    nothing = verdict({**gpu, "torch": Facts(error="no")}, memory)
    assert nothing.level == "missing"
    assert "torch cannot be used" in nothing.found
    assert verdict(gpu, Finding("missing", "shared memory", "none")).level == "missing"


def test_commands_stay_in_one_piece():
    command = "export LD_LIBRARY_PATH=" + "/a/rather/long/folder:" * 5 + " && pip install a"
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
    ours, theirs = pty.openpty()
    code = "from click import echo; from batchvl.doctor import Finding; echo(str(Finding('ok', 'x', 'y')))"
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    os.close(theirs)
    assert b"\x1b[32mok" in os.read(ours, 1000)
    os.close(ours)


def test_libraries_that_break_end_with_2_and_say_so(package):
    environment = package(torch="import os; os.abort()", transformers="", lmdeploy="import torch")
    done = doctor(env=environment)
    assert done.returncode == 2
    assert re.search(r"missing +torch .*SIGABRT", done.stdout)
    assert re.search(r"missing +batchvl run .*torch.* cannot be used", done.stdout)
    assert "Traceback" not in done.stderr


def test_a_hanging_library_is_given_up(package):
    done = doctor("--timeout", "2", "--json", env=package(torch="import time; time.sleep(60)"))
    told = json.loads(done.stdout)
    assert (done.returncode, told["works"], told["engine"]) == (2, False, None)
    [found] = [finding for finding in told["findings"] if finding["what"] == "torch"]
    assert (found["level"], found["found"]) == ("missing", "importing it hangs")
    assert "--timeout" in found["advice"]


def test_an_environment_without_engines_says_what_to_install(tmp_path):
    hidden = "import sys\nfor name in ('torch', 'transformers', 'lmdeploy'):\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(hidden)
    done = doctor(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert re.search(r"missing +torch +not installed\n +-> pip install 'batchvl\[transformers\]'", done.stdout)
    assert re.search(r"missing +batchvl run +no engine can run here", done.stdout)
    assert "pip install 'batchvl[transformers]'" in done.stdout.split("batchvl run")[1]


def test_help_tells_the_exit_codes():
    assert "Exit code 0 if an engine can run, 2 if none can" in " ".join(doctor("--help").stdout.split())
