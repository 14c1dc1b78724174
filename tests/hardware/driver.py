"""A simulated NVIDIA driver: a libnvidia-ml.so.1 compiled from nvml.c, which lists the facts that it understands."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def install_driver(directory: Path, monkeypatch: pytest.MonkeyPatch, *facts: str) -> None:
    """Make processes started from now on find a driver with these facts. Skip the test if there is no compiler."""
    library = directory / "libnvidia-ml.so.1"
    if not library.exists():
        if (gcc := shutil.which("gcc", path="/usr/local/bin:/usr/bin:/bin")) is None:
            pytest.skip("no gcc to compile a simulated libnvidia-ml.so.1")
        directory.mkdir(exist_ok=True)
        source = Path(__file__).with_name("nvml.c")
        environment = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
        subprocess.run([gcc, "-shared", "-fPIC", "-o", str(library), str(source)], check=True, env=environment)
    (directory / "facts").write_text("".join(f"{fact}\n" for fact in facts))
    monkeypatch.setenv("FAKE_NVML", str(directory / "facts"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(directory))
