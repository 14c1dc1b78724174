"""Why TurboMind's native module does not load. Fake modules are hand-made ELF files; the real one needs lmdeploy."""

import ctypes
import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import pytest
from elftools.common.exceptions import ELFError

from batchvl.engines.lmdeploy.libraries import missing_libraries, read_needed
from tests.engines.elf import library


@pytest.fixture
def lmdeploy(tmp_path):
    """A package of that name; the test writes its native module."""
    directory = tmp_path / "site" / "lmdeploy"
    (directory / "turbomind").mkdir(parents=True)
    for package in (directory, directory / "turbomind"):
        (package / "__init__.py").touch()
    return directory


def native(lmdeploy, suffix=EXTENSION_SUFFIXES[0]):
    return lmdeploy / "turbomind" / f"_turbomind{suffix}"


CODE = """
from batchvl.engines.lmdeploy.libraries import turbomind_problem
print(turbomind_problem())
"""


def problem(lmdeploy, **environment):
    """Return what `turbomind_problem` reports for this lmdeploy."""
    environment = {**os.environ, "PYTHONPATH": str(lmdeploy.parent), **environment}
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_the_loader_accepts_the_hand_made_libraries(tmp_path):
    ctypes.CDLL(str(library(tmp_path / "libgood.so")))
    ctypes.CDLL(str(library(tmp_path / "libneeds.so", ["libgood.so"], "$ORIGIN")))
    with pytest.raises(OSError, match="libnone-a"):
        ctypes.CDLL(str(library(tmp_path / "libbad.so", ["libnone-a.so.1", "libnone-b.so.1"])))


def test_needed_libraries_are_read_from_the_file(tmp_path):
    file = library(tmp_path / "lib.so", ["liba.so.1", "libb.so.2"], "$ORIGIN/../x:/usr/y")
    assert read_needed(file) == (["liba.so.1", "libb.so.2"], [tmp_path / "../x", tmp_path.__class__("/usr/y")])
    (tmp_path / "text.so").write_text("not ELF")
    with pytest.raises(ELFError):
        read_needed(tmp_path / "text.so")


def test_indirectly_missing_libraries_are_named_too(tmp_path):
    directory = tmp_path / "lib"
    library(directory / "libthere.so.1", ["libnone-c.so.1"])
    library(directory / "libwhole.so.1")
    (directory / "libtorn.so.1").write_bytes(b"\x7fELF")
    needed = ["libnone-a.so.1", "libc.so.6", "libthere.so.1", "libwhole.so.1", "libtorn.so.1", "libnone-b.so.1"]
    missing = dict(missing_libraries(library(tmp_path / "module.so", needed, "$ORIGIN/lib")))
    assert "libtorn.so.1: file too short" in missing.pop("libtorn.so.1")
    assert missing == {"libnone-a.so.1": "", "libnone-b.so.1": "", "libnone-c.so.1": ""}


def test_a_module_that_loads_has_no_problem(lmdeploy):
    native(lmdeploy).touch()
    (lmdeploy / "turbomind" / "__init__.py").write_text("import sys; sys.modules[__name__ + '._turbomind'] = sys")
    assert problem(lmdeploy) == "None"


def test_each_missing_library_is_named_with_its_source(lmdeploy, tmp_path):
    library(native(lmdeploy), ["libcublas.so.99", "libnone.so.1", "libc.so.6"])
    assert problem(lmdeploy) == "missing shared libraries: libcublas.so.99 and libnone.so.1 (a system package)"
    library(native(lmdeploy), ["libcublas.so.12", "libcudart.so.12", "libcuda.so.1", "libcublasLt.so.12"])
    report = problem(lmdeploy)
    if "libcuda.so.1" in report:  # else this machine has a driver
        assert "libcuda.so.1 (part of the NVIDIA driver)" in report
    if "libcublas" in report and "which is not searched" not in report:
        assert "libcublas.so.12 and libcublasLt.so.12 (nvidia-cublas-cu12)" in report
        assert "libcudart.so.12 (nvidia-cuda-runtime-cu12)" in report
        assert report.endswith("; pip install nvidia-cublas-cu12 nvidia-cuda-runtime-cu12")
        assert "\n" not in report


def test_libraries_that_pip_put_elsewhere_are_found(lmdeploy, tmp_path):
    elsewhere = tmp_path / "other" / "nvidia" / "none" / "lib"
    library(native(lmdeploy), ["libnone.so.1"])
    library(elsewhere / "libnone.so.1")
    path = f"{lmdeploy.parent}{os.pathsep}{tmp_path / 'other'}"
    report = problem(lmdeploy, PYTHONPATH=path)
    assert f"libnone.so.1 (in {elsewhere}, which is not searched)" in report
    assert f'export LD_LIBRARY_PATH="{elsewhere}:$LD_LIBRARY_PATH"' in report
    report = problem(lmdeploy, PYTHONPATH=path, LD_LIBRARY_PATH=str(elsewhere))
    assert "not searched" not in report, "the advice helps"


def test_a_module_for_another_python_and_none(lmdeploy):
    assert problem(lmdeploy).startswith("this lmdeploy was built without TurboMind; ")
    native(lmdeploy, ".cpython-27-x86_64-linux-gnu.so").touch()
    report = problem(lmdeploy)
    assert "is not built for this Python: found cpython-27-x86_64-linux-gnu, expected cpython-3" in report
    assert "pip install --force-reinstall" in report


def test_a_broken_module_is_quoted(lmdeploy):
    native(lmdeploy).write_text("not ELF" * 100)
    assert "ImportError" in problem(lmdeploy)
    assert "invalid ELF header" in problem(lmdeploy)
    (lmdeploy / "__init__.py").write_text("import nowhere")
    assert problem(lmdeploy).startswith(
        "ModuleNotFoundError: No module named 'nowhere'; pip install 'batchvl[lmdeploy]'"
    )
    (lmdeploy / "__init__.py").write_text("raise SystemExit(1)")
    assert problem(lmdeploy).startswith("SystemExit: 1; ")


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="lmdeploy is installed here")
def test_without_lmdeploy(tmp_path):
    assert problem(tmp_path / "nothing") == "lmdeploy is not installed; pip install 'batchvl[lmdeploy]'"


@pytest.mark.lmdeploy
def test_the_real_module_lacks_what_ldd_reports():
    [directory] = find_spec("lmdeploy").submodule_search_locations
    file = os.path.join(directory, "turbomind", f"_turbomind{EXTENSION_SUFFIXES[0]}")
    listing = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    absent = set(re.findall(r"(\S+) => not found", listing))
    code = "import torch; from batchvl.engines.lmdeploy.libraries import turbomind_problem; print(turbomind_problem())"
    report = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # torch's own libraries are loaded already: fewer may be missing than ldd reports, but no others.
    named = set(re.findall(r"lib\w+\.so[.\d]*", report.split("; ")[0]))
    assert named <= absent
    assert absent - named <= {"libnccl.so.2"}
    assert ("None" in report) == (not named)
    assert len(report.splitlines()) == 1
    for name, package in (("libcublas.so.12", "nvidia-cublas-cu12"), ("libcudart.so.12", "nvidia-cuda-runtime-cu12")):
        assert (name in named) == (package in report)
