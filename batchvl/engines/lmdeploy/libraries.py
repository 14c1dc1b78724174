"""Explain why TurboMind's native module does not load: which shared libraries are missing and what installs them.

The loader's own error names only the first missing library. Here the module's ELF header is read instead: everything
that it needs, and where it looks. Importing this module imports neither torch nor lmdeploy.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..probe import Facts

INSTALL = "pip install 'batchvl[lmdeploy]'"
REINSTALL = "python -m pip install --force-reinstall --no-deps 'lmdeploy>=0.18,<0.19'"
PACKAGES = {
    "libcublas.so.12": "nvidia-cublas-cu12",
    "libcublasLt.so.12": "nvidia-cublas-cu12",
    "libcudart.so.12": "nvidia-cuda-runtime-cu12",
    "libcurand.so.10": "nvidia-curand-cu12",
    "libnccl.so.2": "nvidia-nccl-cu12",
}
"""The Python package that installs each library."""
DRIVER_LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")
MODULE = "_turbomind"


@dataclass(frozen=True, slots=True)
class LoadProblem:
    """Why TurboMind does not load, and the command that fixes it ("" if none is known)."""

    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.reason}; {self.advice}" if self.advice else self.reason


def probe(package: str) -> Facts:
    """Return whether TurboMind loads in this process: the probe of `batchvl doctor`."""
    problem = turbomind_problem()
    return Facts() if problem is None else Facts(error=problem.reason, advice=problem.advice)


def turbomind_problem() -> LoadProblem | None:
    """Return why TurboMind's native module does not load in this process; None if it loads.

    Imports lmdeploy, and with it torch, whose own CUDA libraries count as present. Raises nothing.
    """
    try:
        spec = find_spec("lmdeploy")
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return LoadProblem("lmdeploy is not installed", INSTALL)
    directory = Path(next(iter(spec.submodule_search_locations))) / "turbomind"
    built = sorted(path.name for path in directory.glob(f"{MODULE}*.so"))
    file = next((directory / name for name in built if name.removeprefix(MODULE) in EXTENSION_SUFFIXES), None)
    if file is None:
        return _not_built(built)
    try:
        import_module(f"lmdeploy.turbomind.{MODULE}")
    except (Exception, SystemExit) as error:
        return _diagnose(file, error)
    return None


def _diagnose(file: Path, error: BaseException) -> LoadProblem:
    """Return why a native module whose import raised `error` does not load."""
    absent: list[str] = []
    broken: list[str] = []
    with suppress(ImportError):  # without pyelftools the loader's error has to do
        for name, message in missing_libraries(file):
            if message:
                broken.append(message)
            else:
                absent.append(name)
    if absent:
        return _absent(absent)
    reason = " ".join("; ".join(broken or [f"{type(error).__name__}: {error}"]).split())
    return LoadProblem(reason, INSTALL if isinstance(error, ModuleNotFoundError) else _reinstall(broken))


def missing_libraries(file: Path) -> Iterator[tuple[str, str]]:
    """Yield every library that an ELF file needs, directly or indirectly, and that does not load in this process.

    Yields:
        The library's name, and the loader's error, which is "" if the library does not exist.
    """
    from elftools.common.exceptions import ELFError

    seen: set[str] = set()
    files = [file]
    while files:
        file = files.pop()
        try:
            needed, directories = read_needed(file)
        except (OSError, ELFError):
            continue  # the loader has reported the library that needs it
        for name in needed:
            if name in seen or not _load_error(name):
                continue
            seen.add(name)
            path = next((path for directory in directories if (path := directory / name).exists()), None)
            if path is None:
                yield name, ""
            elif message := _load_error(str(path)):
                if os.path.basename(message.partition(":")[0]) != name:
                    files.append(path)  # it is fine itself; a library that it needs does not load
                else:
                    yield name, message


def read_needed(file: Path) -> tuple[list[str], list[Path]]:
    """Return the names of the libraries that an ELF file needs, and the directories that it has searched first.

    Raises:
        OSError: The file cannot be read.
        elftools.common.exceptions.ELFError: It is not an ELF file.
    """
    from elftools.elf.elffile import ELFFile

    needed: list[str] = []
    search: list[str] = []
    origin = str(file.resolve().parent)
    with file.open("rb") as stream:
        segments: Iterator[Any] = ELFFile(stream).iter_segments("PT_DYNAMIC")
        for segment in segments:
            for tag in segment.iter_tags():
                match tag.entry.d_tag:
                    case "DT_NEEDED":
                        needed.append(tag.needed)
                    case "DT_RPATH":
                        search += tag.rpath.split(":")
                    case "DT_RUNPATH":
                        search += tag.runpath.split(":")
    return needed, [Path(entry.replace("${ORIGIN}", origin).replace("$ORIGIN", origin)) for entry in search if entry]


def _load_error(library: str) -> str:
    """Return the loader's error for a library, by name or path; "" if it loads or is already loaded."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _absent(names: Iterable[str]) -> LoadProblem:
    """Return the problem of libraries that TurboMind does not find, with the source of each."""
    by_source: dict[str, list[str]] = {}
    packages: set[str] = set()
    directories: list[str] = []
    for name in names:
        if directory := _installed_elsewhere(name):
            source = f"in {directory}, which is not searched"
            directories.append(directory)
        elif name in PACKAGES:
            source = PACKAGES[name]
            packages.add(source)
        else:
            source = "part of the NVIDIA driver" if name in DRIVER_LIBRARIES else "a system package"
        by_source.setdefault(source, []).append(name)
    missing = ", ".join(f"{' and '.join(libraries)} ({source})" for source, libraries in by_source.items())
    advice = []
    if packages:
        advice.append(f"pip install {' '.join(sorted(packages))}")
    if directories:
        search = ":".join(dict.fromkeys(directories))
        advice.append(f'export LD_LIBRARY_PATH="{search}:$LD_LIBRARY_PATH"')
    return LoadProblem(f"missing shared libraries: {missing}", " && ".join(advice))


def _installed_elsewhere(name: str) -> str | None:
    """Return a directory of pip's nvidia packages with the library, if they are not installed next to lmdeploy."""
    matches = (glob.glob(f"{glob.escape(directory)}/nvidia/*/lib/{name}") for directory in sys.path if directory)
    return next((os.path.dirname(paths[0]) for paths in matches if paths), None)


def _reinstall(messages: Iterable[str]) -> str:
    """Return the command that reinstalls the packages of libraries that exist and do not load, else lmdeploy."""
    packages = {package for name, package in PACKAGES.items() if any(name in message for message in messages)}
    return f"pip install --force-reinstall --no-deps {' '.join(sorted(packages))}" if packages else REINSTALL


def _not_built(files: Iterable[str]) -> LoadProblem:
    tags = {match[1] for name in files if (match := re.fullmatch(rf"{MODULE}\.(.+)\.so", name))}
    if not tags:
        return LoadProblem("this lmdeploy was built without TurboMind", REINSTALL)
    this_python = EXTENSION_SUFFIXES[0].strip(".").removesuffix(".so")
    reason = f"TurboMind is not built for this Python: found {', '.join(sorted(tags))}, expected {this_python}"
    return LoadProblem(reason, REINSTALL)
