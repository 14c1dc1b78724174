"""Find out whether a library can be imported: in a process of its own, since the import may hang, exit or abort.

`python -P -m batchvl.engines.probe torch` prints `Facts` as one line of JSON, the last line of its output.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from importlib.util import find_spec
from typing import Any

import msgspec

from ..hardware.commands import kill_group
from ..ipc.spawn import die_with_parent, spawn
from .registry import LIBRARIES

_MAX_REASON = 160
"""Characters of an error's message that are kept."""


class Facts(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Findings about one library."""

    installed: bool = True
    version: str = ""
    error: str = ""
    """Why it cannot be used, if it cannot."""
    advice: str = ""
    """The command that fixes it, if known."""
    built_for: str = ""
    """torch: "CUDA 13.0" and the like, "" for a CPU build."""
    gpus: tuple[str, ...] = ()
    """torch: the names of the GPUs that it can compute on."""
    no_gpu: str = ""
    """torch: why it can use none of the GPUs."""

    @property
    def usable(self) -> bool:
        """Whether it is installed and can be imported."""
        return self.installed and not self.error


class Probe:
    """The running process that examines one library.

    Args:
        name: Key of `registry.LIBRARIES`.
        environment: Environment variables of the process.
    """

    def __init__(self, name: str, environment: Mapping[str, str] = os.environ) -> None:
        self.name = name
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `facts`
        arguments = [name, str(os.getpid())]
        self._process = spawn("batchvl.engines.probe", arguments, [], environment, self._output)

    def facts(self, until: float) -> Facts:
        """Wait for the findings until time.monotonic() reaches `until`, then end the process."""
        code: int | None = None
        try:
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Facts(error="importing it hangs")
        finally:
            kill_group(self._process)
            with self._output as file:
                file.seek(0)
                lines = file.read().decode("utf-8", "replace").split("\n")
        if code == 0:
            with suppress(msgspec.MsgspecError, IndexError):
                return msgspec.json.decode(lines[-2], type=Facts)
        how = f"is killed by {signal.Signals(-code).name}" if code < 0 else f"exits with {code}"
        last_line = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Facts(error=f"a process that imports it {how}{last_line and ': '}{last_line[-_MAX_REASON:]}")

    def end(self) -> None:
        """Kill the process if it is still running."""
        kill_group(self._process)


def probe(name: str) -> Facts:
    """Import a library of `registry.LIBRARIES` into this process and return the findings.

    Raises nothing, but may not return.
    """
    library = LIBRARIES[name]
    try:
        if find_spec(library.package) is None:
            return Facts(installed=False)
        module, _, function = library.probe.partition(":")
        facts: Facts = getattr(import_module(module), function)(library.package)
        return facts
    except BaseException as error:
        return Facts(version=_distribution(library.package), error=f"{type(error).__name__}: {_first_sentence(error)}")


def import_package(package: str) -> Facts:
    """Import a package and return its version: the probe of a library without special needs."""
    module: Any = import_module(package)
    return Facts(version=str(getattr(module, "__version__", "") or _distribution(package)))


def probe_torch(package: str) -> Facts:
    """Import torch and compute on a GPU. A GPU whose driver is too old is listed, but cannot be used."""
    import torch

    cuda, rocm = torch.version.cuda, getattr(torch.version, "hip", None)
    built_for = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else ""
    facts = Facts(version=str(torch.__version__), built_for=built_for)
    if not built_for:
        return facts
    try:
        torch.ones(8, device="cuda").sum().item()
        names = tuple(str(torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count()))
        return msgspec.structs.replace(facts, gpus=names)
    except Exception as error:
        return msgspec.structs.replace(facts, no_gpu=_first_sentence(error))


def probe_transformers(package: str) -> Facts:
    """Import the part of transformers that its engine uses; the package itself imports almost nothing."""
    from transformers import AutoModelForImageTextToText  # noqa: F401

    return import_package(package)


def _distribution(package: str) -> str:
    try:
        return distribution_version(package)
    except PackageNotFoundError:
        return ""


def _first_sentence(error: BaseException) -> str:
    """Return the first sentence of an error's message; libraries often continue with download instructions."""
    first = str(error).strip().split("\n")[0].split(". ")[0]
    return first[:_MAX_REASON] or "no reason given"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in LIBRARIES:
        sys.exit(f"expected one of {', '.join(LIBRARIES)}")
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]))
    line = b"\n" + msgspec.json.encode(probe(sys.argv[1])) + b"\n"
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, line)
    os._exit(0)  # threads of the library must not delay the exit


if __name__ == "__main__":
    from batchvl.engines import probe as this_module  # probes of engine packages import `Facts` from it, not __main__

    this_module.main()
