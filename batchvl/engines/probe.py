"""Whether a library can be imported here: tried in a process of its own, which may hang, exit or abort.

`python -P -m batchvl.engines.probe torch` prints what it finds as one line of JSON, the last of what it prints.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from importlib.util import find_spec
from typing import Any

import msgspec

from ..hardware.commands import kill_group
from ..ipc.spawn import die_with_parent, spawn

_LAST_WORDS = 160


class Facts(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a library's probe found."""

    installed: bool = True
    version: str = ""
    error: str = ""
    """Why it cannot be used, if it cannot."""
    advice: str = ""
    built_for: str = ""
    """torch: "CUDA 13.0" and the like, "" where it can use no GPU at all."""
    gpus: tuple[str, ...] = ()
    """torch: the names of the GPUs that it has computed something on, or could."""
    no_gpu: str = ""
    """torch: why it uses none of those there are."""

    @property
    def usable(self) -> bool:
        return self.installed and not self.error


class Probe:
    """A probe's process, running."""

    def __init__(self, name: str, environment: Mapping[str, str] = os.environ) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `facts`
        arguments = [name, str(os.getpid())]
        self._process = spawn("batchvl.engines.probe", arguments, [], environment, self._said)

    def facts(self, until: float) -> Facts:
        """Waits until time.monotonic() is `until`, at most, and ends the process."""
        code: int | None = None
        try:
            code = self._process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return Facts(error="importing it hangs")
        finally:
            kill_group(self._process)
            with self._said as file:
                file.seek(0)
                lines = file.read().decode("utf-8", "replace").split("\n")
        if code == 0:
            with suppress(msgspec.MsgspecError, IndexError):
                return msgspec.json.decode(lines[-2], type=Facts)
        how = f"is killed by {signal.Signals(-code).name}" if code < 0 else f"exits with {code}"
        words = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return Facts(error=f"a process that imports it {how}{words and ': '}{words[-_LAST_WORDS:]}")

    def end(self) -> None:
        kill_group(self._process)


def torch() -> Facts:
    """torch, and whether it computes on a GPU: one with a driver that is too old is seen and cannot be used."""
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
        return msgspec.structs.replace(facts, no_gpu=_sentence(error))


def transformers() -> Facts:
    """transformers, as far as the engine of that name needs it."""
    from transformers import AutoModelForImageTextToText  # noqa: F401 - a lazy module: `import transformers` says little

    return _version("transformers")


def lmdeploy() -> Facts:
    import_module("lmdeploy")
    return _version("lmdeploy")


def turbomind() -> Facts:
    """LMDeploy's TurboMind, with the libraries that it needs."""
    from .lmdeploy.libraries import turbomind_unloadable

    why = turbomind_unloadable()
    return Facts() if why is None else Facts(error=why.found, advice=why.advice)


PROBES: Mapping[str, tuple[str, Callable[[], Facts]]] = {
    "torch": ("torch", torch),
    "transformers": ("transformers", transformers),
    "lmdeploy": ("lmdeploy", lmdeploy),
    "turbomind": ("lmdeploy", turbomind),
}
"""Each with the package that it is about."""


def probe(name: str) -> Facts:
    """Imports the library into this process and tells what it found. Raises nothing, but may not return."""
    package, look = PROBES[name]
    try:
        return look() if find_spec(package) else Facts(installed=False)
    except BaseException as error:
        return Facts(version=_distribution(package), error=f"{type(error).__name__}: {_sentence(error)}")


def _version(package: str) -> Facts:
    module: Any = sys.modules[package]
    return Facts(version=str(getattr(module, "__version__", "") or _distribution(package)))


def _distribution(package: str) -> str:
    try:
        return distribution_version(package)
    except PackageNotFoundError:
        return ""


def _sentence(error: BaseException) -> str:
    """The first sentence of what an error says; libraries go on with what one might download."""
    first = str(error).strip().split("\n")[0].split(". ")[0]
    return first[:_LAST_WORDS] or "no reason given"


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in PROBES:
        sys.exit(f"want one of {', '.join(PROBES)}")
    if len(sys.argv) > 2:
        die_with_parent(int(sys.argv[2]))
    line = b"\n" + msgspec.json.encode(probe(sys.argv[1])) + b"\n"
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, line)
    os._exit(0)  # a library's threads must not hold it up


if __name__ == "__main__":
    main()
