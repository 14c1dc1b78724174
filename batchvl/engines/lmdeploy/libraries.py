"""Why TurboMind's native module does not load: which shared libraries it misses, and what brings them.

The loader's own error names the first missing library only. Here the module's ELF header is read instead: all that it
needs, and where it looks. Imports neither torch nor lmdeploy by itself.
"""

from __future__ import annotations

import ctypes
import glob
import os
import re
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install 'batchvl[lmdeploy]'"
PACKAGES = {
    "libcublas.so.12": "nvidia-cublas-cu12",
    "libcublasLt.so.12": "nvidia-cublas-cu12",
    "libcudart.so.12": "nvidia-cuda-runtime-cu12",
    "libcurand.so.10": "nvidia-curand-cu12",
    "libnccl.so.2": "nvidia-nccl-cu12",
}
DRIVER = ("libcuda.so.1", "libnvidia-ml.so.1")
_AGAIN = "python -m pip install --force-reinstall --no-deps 'lmdeploy>=0.18,<0.19'"
_MODULE = "_turbomind"
_LOAD, _DYNAMIC = 1, 2  # kinds of an ELF file's segments
_END, _NEEDED, _STRTAB, _STRSZ, _RPATH, _RUNPATH = 0, 1, 5, 10, 15, 29  # kinds of its dynamic entries


@dataclass(frozen=True, slots=True)
class Unloadable:
    """What is wrong, and the command that mends it, "" where none does."""

    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}; {self.advice}" if self.advice else self.found


def turbomind_missing() -> str | None:
    """None where TurboMind's native module loads in this process, else one line: what is missing and what brings it.

    Imports lmdeploy, and with it torch, whose own CUDA libraries count as there. Raises nothing.
    """
    why = turbomind_unloadable()
    return None if why is None else str(why)


def turbomind_unloadable() -> Unloadable | None:
    """The same as `turbomind_missing`, in two parts."""
    try:
        spec = find_spec("lmdeploy")
    except ValueError:
        spec = None
    if spec is None or not spec.submodule_search_locations:
        return Unloadable("lmdeploy is not installed", INSTALL)
    folder = Path(next(iter(spec.submodule_search_locations))) / "turbomind"
    built = sorted(path.name for path in folder.glob(f"{_MODULE}*.so"))
    file = next((folder / name for name in built if name.removeprefix(_MODULE) in EXTENSION_SUFFIXES), None)
    if file is None:
        return _not_built(built)
    try:
        import_module(f"lmdeploy.turbomind.{_MODULE}")
    except (Exception, SystemExit) as error:
        absent: list[str] = []
        broken: list[str] = []
        for name, why in missing_libraries(file):
            (broken if why else absent).append(why or name)
        if absent:
            return _absent(absent)
        words = " ".join("; ".join(broken or [f"{type(error).__name__}: {error}"]).split())
        if isinstance(error, ModuleNotFoundError):
            return Unloadable(words, INSTALL)
        return Unloadable(words, _again(broken))
    return None


def missing_libraries(file: Path) -> Iterator[tuple[str, str]]:
    """Each library that the ELF file, or one that it brings along, needs and that does not load in this process: its
    name, and "" where there is none, else the loader's words.
    """
    seen: set[str] = set()
    files = [file]
    while files:
        file = files.pop()
        try:
            needed, folders = needs(file)
        except (OSError, ValueError, struct.error):
            continue  # the loader has said what it makes of it
        for name in needed:
            if name in seen or not _why_not(name):
                continue
            seen.add(name)
            there = next((path for folder in folders if (path := folder / name).exists()), None)
            if there is None:
                yield name, ""
            elif why := _why_not(str(there)):
                if os.path.basename(why.partition(":")[0]) != name:
                    files.append(there)  # it is another one, which this one needs, that does not load
                else:
                    yield name, why


def needs(file: Path) -> tuple[list[str], list[Path]]:
    """The libraries that an ELF file needs by name, and the folders where it has them looked for first.

    The file's layout is that of elf(5), for 64 bits and little-endian. Raises OSError, ValueError, struct.error.
    """
    with file.open("rb") as elf:
        header = elf.read(64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{file} is no ELF file of 64 bits")
        (start,) = struct.unpack_from("<Q", header, 32)
        size, count = struct.unpack_from("<HH", header, 54)
        elf.seek(start)
        table = elf.read(size * count)
        segments = [struct.unpack_from("<IIQQQQ", table, size * number) for number in range(count)]
        loaded = [(address, offset, length) for kind, _, offset, address, _, length in segments if kind == _LOAD]
        entries: list[tuple[int, int]] = []
        for kind, _, offset, _, _, length in segments:
            if kind == _DYNAMIC:
                elf.seek(offset)
                entries += struct.iter_unpack("<qQ", elf.read(length // 16 * 16))
        values = dict(entries)
        if _STRTAB not in values:
            return [], []
        at = next((o + values[_STRTAB] - a for a, o, n in loaded if a <= values[_STRTAB] < a + n), values[_STRTAB])
        elf.seek(at)
        strings = elf.read(values.get(_STRSZ, 0))

    def string(position: int) -> str:
        return os.fsdecode(strings[position : strings.index(b"\0", position)])

    needed = [string(value) for tag, value in entries if tag == _NEEDED]
    looked = ":".join(string(value) for tag, value in entries if tag in (_RPATH, _RUNPATH))
    origin = str(file.resolve().parent)
    folders = [part.replace("${ORIGIN}", origin).replace("$ORIGIN", origin) for part in looked.split(":") if part]
    return needed, [Path(folder) for folder in folders]


def _why_not(library: str) -> str:
    """The loader's words if it does not load a library, by name or path; "" if it does, or has already."""
    try:
        ctypes.CDLL(library)
    except OSError as error:
        return str(error)
    return ""


def _absent(names: Iterable[str]) -> Unloadable:
    """Libraries that are not where TurboMind looks, with what brings each."""
    brought: dict[str, list[str]] = {}
    install, elsewhere, advice = [], [], []
    for name in names:
        if folder := _elsewhere(name):
            source = f"in {folder}, where it does not look"
            elsewhere.append(folder)
        elif name in PACKAGES:
            source = PACKAGES[name]
            install.append(source)
        else:
            source = "the NVIDIA driver, on a GPU machine" if name in DRIVER else "a package of the system"
        brought.setdefault(source, []).append(name)
    found = ", ".join(f"{' and '.join(libraries)} ({source})" for source, libraries in brought.items())
    if install:
        advice.append(f"pip install {' '.join(sorted(set(install)))}")
    if elsewhere:
        folders = ":".join(dict.fromkeys(elsewhere))
        advice.append(f'export LD_LIBRARY_PATH="{folders}:$LD_LIBRARY_PATH"')
    return Unloadable(f"found no {found}", " && ".join(advice))


def _elsewhere(name: str) -> str | None:
    """A folder of pip's nvidia packages that has the library: they were not installed beside lmdeploy."""
    found = (glob.glob(f"{glob.escape(folder)}/nvidia/*/lib/{name}") for folder in sys.path if folder)
    return next((os.path.dirname(paths[0]) for paths in found if paths), None)


def _again(broken: Iterable[str]) -> str:
    """What to install again: the packages of libraries that are there and do not load, else lmdeploy."""
    packages = {package for name, package in PACKAGES.items() if any(name in words for words in broken)}
    return f"pip install --force-reinstall --no-deps {' '.join(sorted(packages))}" if packages else _AGAIN


def _not_built(files: Iterable[str]) -> Unloadable:
    tags = {match[1] for name in files if (match := re.fullmatch(rf"{_MODULE}\.(.+)\.so", name))}
    if not tags:
        return Unloadable("this lmdeploy was built without TurboMind", _AGAIN)
    here = EXTENSION_SUFFIXES[0].strip(".").removesuffix(".so")
    return Unloadable(f"TurboMind is not built for this Python: found {', '.join(sorted(tags))}, want {here}", _AGAIN)
