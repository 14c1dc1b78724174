"""What TurboMind's native module misses. Fake modules are ELF files made by hand; the real one needs lmdeploy."""

import ctypes
import json
import os
import re
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec

import pytest

from batchvl.engines.lmdeploy.libraries import missing_libraries, needs
from tests.engines.elf import library


@pytest.fixture
def lmdeploy(tmp_path):
    """A package of that name; its native module is written by the test."""
    folder = tmp_path / "site" / "lmdeploy"
    (folder / "turbomind").mkdir(parents=True)
    for package in (folder, folder / "turbomind"):
        (package / "__init__.py").touch()
    return folder


def native(lmdeploy, suffix=EXTENSION_SUFFIXES[0]):
    return lmdeploy / "turbomind" / f"_turbomind{suffix}"


def missing(lmdeploy, **environment):
    """What `turbomind_missing` says where this lmdeploy is the one that is imported."""
    code = "from batchvl.engines.lmdeploy.libraries import turbomind_missing as f; import json; print(json.dumps(f()))"
    environment = {**os.environ, "PYTHONPATH": str(lmdeploy.parent), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_made_libraries_are_what_the_loader_takes(tmp_path):
    ctypes.CDLL(str(library(tmp_path / "libgood.so")))
    ctypes.CDLL(str(library(tmp_path / "libneeds.so", ["libgood.so"], "$ORIGIN")))
    with pytest.raises(OSError, match="libnone-a"):
        ctypes.CDLL(str(library(tmp_path / "libbad.so", ["libnone-a.so.1", "libnone-b.so.1"])))


def test_needs_are_read_from_the_file(tmp_path):
    file = library(tmp_path / "lib.so", ["liba.so.1", "libb.so.2"], "$ORIGIN/../x:/usr/y")
    assert needs(file) == (["liba.so.1", "libb.so.2"], [tmp_path / "../x", tmp_path.__class__("/usr/y")])
    (tmp_path / "text.so").write_text("no ELF")
    with pytest.raises(ValueError, match="no ELF file"):
        needs(tmp_path / "text.so")


def test_every_missing_library_is_named_those_behind_others_too(tmp_path):
    folder = tmp_path / "lib"
    library(folder / "libthere.so.1", ["libnone-c.so.1"])
    library(folder / "libwhole.so.1")
    (folder / "libtorn.so.1").write_bytes(b"\x7fELF")
    wanted = ["libnone-a.so.1", "libc.so.6", "libthere.so.1", "libwhole.so.1", "libtorn.so.1", "libnone-b.so.1"]
    found = dict(missing_libraries(library(tmp_path / "module.so", wanted, "$ORIGIN/lib")))
    assert "libtorn.so.1: file too short" in found.pop("libtorn.so.1")
    assert found == {"libnone-a.so.1": "", "libnone-b.so.1": "", "libnone-c.so.1": ""}


def test_a_module_that_loads_is_none(lmdeploy):
    native(lmdeploy).touch()
    (lmdeploy / "turbomind" / "__init__.py").write_text("import sys; sys.modules[__name__ + '._turbomind'] = sys")
    assert missing(lmdeploy) is None


def test_each_missing_library_is_named_with_what_brings_it(lmdeploy, tmp_path):
    library(native(lmdeploy), ["libcublas.so.99", "libnone.so.1", "libc.so.6"])
    assert missing(lmdeploy) == "found no libcublas.so.99 and libnone.so.1 (a package of the system)"
    library(native(lmdeploy), ["libcublas.so.12", "libcudart.so.12", "libcuda.so.1", "libcublasLt.so.12"])
    said = missing(lmdeploy)
    if "libcuda.so.1" in said:  # else this machine has a driver
        assert "libcuda.so.1 (the NVIDIA driver, on a GPU machine)" in said
    if "libcublas" in said and "where it does not look" not in said:
        assert "libcublas.so.12 and libcublasLt.so.12 (nvidia-cublas-cu12)" in said
        assert "libcudart.so.12 (nvidia-cuda-runtime-cu12)" in said
        assert said.endswith("; pip install nvidia-cublas-cu12 nvidia-cuda-runtime-cu12")
        assert "\n" not in said


def test_libraries_that_pip_put_elsewhere_are_found(lmdeploy, tmp_path):
    elsewhere = tmp_path / "other" / "nvidia" / "none" / "lib"
    library(native(lmdeploy), ["libnone.so.1"])
    library(elsewhere / "libnone.so.1")
    path = f"{lmdeploy.parent}{os.pathsep}{tmp_path / 'other'}"
    said = missing(lmdeploy, PYTHONPATH=path)
    assert f"libnone.so.1 (in {elsewhere}, where it does not look)" in said
    assert f'export LD_LIBRARY_PATH="{elsewhere}:$LD_LIBRARY_PATH"' in said
    said = missing(lmdeploy, PYTHONPATH=path, LD_LIBRARY_PATH=str(elsewhere))
    assert "does not look" not in said, "the advice helps"


def test_another_python_s_module_and_none(lmdeploy):
    assert missing(lmdeploy).startswith("this lmdeploy was built without TurboMind; ")
    native(lmdeploy, ".cpython-27-x86_64-linux-gnu.so").touch()
    said = missing(lmdeploy)
    assert "is not built for this Python: found cpython-27-x86_64-linux-gnu, want cpython-3" in said
    assert "pip install --force-reinstall" in said


def test_a_broken_module_is_quoted(lmdeploy):
    native(lmdeploy).write_text("no ELF" * 100)
    assert "ImportError" in missing(lmdeploy)
    assert "invalid ELF header" in missing(lmdeploy)
    (lmdeploy / "__init__.py").write_text("import nowhere")
    assert missing(lmdeploy).startswith(
        "ModuleNotFoundError: No module named 'nowhere'; pip install 'batchvl[lmdeploy]'"
    )
    (lmdeploy / "__init__.py").write_text("raise SystemExit(1)")
    assert missing(lmdeploy).startswith("SystemExit: 1; ")


@pytest.mark.skipif(find_spec("lmdeploy") is not None, reason="lmdeploy is installed here")
def test_without_lmdeploy(tmp_path):
    assert missing(tmp_path / "nothing") == "lmdeploy is not installed; pip install 'batchvl[lmdeploy]'"


@pytest.mark.lmdeploy
def test_the_real_module_misses_what_ldd_misses():
    [folder] = find_spec("lmdeploy").submodule_search_locations
    file = os.path.join(folder, "turbomind", f"_turbomind{EXTENSION_SUFFIXES[0]}")
    told = subprocess.run(["ldd", file], capture_output=True, text=True, check=True).stdout
    absent = set(re.findall(r"(\S+) => not found", told))
    code = "import torch; from batchvl.engines.lmdeploy.libraries import turbomind_missing; print(turbomind_missing())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # torch's own libraries are in the process already, so that there may be more than ldd finds, and no others less.
    named = set(re.findall(r"lib\w+\.so[.\d]*", said.split("; ")[0]))
    assert named <= absent
    assert absent - named <= {"libnccl.so.2"}
    assert ("None" in said) == (not named)
    assert len(said.splitlines()) == 1
    for name, package in (("libcublas.so.12", "nvidia-cublas-cu12"), ("libcudart.so.12", "nvidia-cuda-runtime-cu12")):
        assert (name in named) == (package in said)
