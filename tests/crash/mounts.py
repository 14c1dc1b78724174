"""File systems of their own: mounts that only a test and the processes it starts there see."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..runner.running import wait_until

# As root a namespace of mounts; without, one of users around it, in which we are root.
_WAYS = ((), ("--user", "--map-root-user"))


class Mounts:
    """A namespace of mounts, gone with all that is mounted in it at the end.

    `enter` is what a command line begins with to run in there.
    """

    def __init__(self, holder: subprocess.Popen[bytes], way: tuple[str, ...]) -> None:
        self._holder = holder
        user = ("--user", "--preserve-credentials") if way else ()
        self.enter = ["nsenter", "--target", str(holder.pid), *user, "--mount"]

    def run(self, *command: str | Path) -> None:
        """Runs a command in there. Raises CalledProcessError."""
        subprocess.run([*self.enter, *map(str, command)], check=True, capture_output=True)

    def seen(self, path: Path) -> Path:
        """What is at `path` in there, for who is not."""
        return Path(f"/proc/{self._holder.pid}/root{path}")


@contextmanager
def mounts() -> Iterator[Mounts]:
    """A namespace of mounts; skips the test where there can be none."""
    why = "no unshare(1)"
    for way in _WAYS:
        try:
            holder = subprocess.Popen(
                ["unshare", *way, "--mount", "--propagation", "private", "sleep", "infinity"], stderr=subprocess.PIPE
            )
        except FileNotFoundError:
            break
        try:
            if _entered(holder):
                yield Mounts(holder, way)
                return
            assert holder.stderr
            why = holder.stderr.read().decode().strip()
        finally:
            holder.kill()
            holder.wait()
            assert holder.stderr
            holder.stderr.close()
    pytest.skip(f"no namespace of mounts is to be had here: {why}")


@contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Mounts]:
    """A tmpfs of that size mounted at the folder `at`, which is made."""
    at.mkdir()
    with mounts() as found:
        try:
            found.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"mounting a tmpfs is not possible here: {error.stderr.decode().strip()}")
        yield found


def fill(folder: Path) -> Path:
    """Fills the folder's file system to the last byte; the file that does."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return ballast


def _entered(holder: subprocess.Popen[bytes]) -> bool:
    """Waits until the holder sleeps in its namespace; False where it ended instead."""
    program = f"/proc/{holder.pid}/exe"
    wait_until(lambda: holder.poll() is not None or os.path.basename(os.readlink(program)) == "sleep")
    return holder.poll() is None
