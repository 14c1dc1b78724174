"""Mounts that are visible only to a test and the processes that it starts in their namespace."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ..runner.running import wait_until

# As root, a mount namespace; as another user, a user namespace around it in which we are root.
_UNSHARE_OPTIONS = ((), ("--user", "--map-root-user"))


class Mounts:
    """A mount namespace, which ends with all of its mounts.

    `enter` is the beginning of a command line that runs in the namespace.
    """

    def __init__(self, holder: subprocess.Popen[bytes], options: tuple[str, ...]) -> None:
        self._holder = holder
        user = ("--user", "--preserve-credentials") if options else ()
        self.enter = ["nsenter", "--target", str(holder.pid), *user, "--mount"]

    def run(self, *command: str | Path) -> None:
        """Run a command in the namespace. Raises CalledProcessError."""
        subprocess.run([*self.enter, *map(str, command)], check=True, capture_output=True)

    def from_outside(self, path: Path) -> Path:
        """Return the path outside of the namespace for a path inside."""
        return Path(f"/proc/{self._holder.pid}/root{path}")


@contextmanager
def mounts() -> Iterator[Mounts]:
    """Create a mount namespace; skip the test if that is not possible."""
    reason = "no unshare(1)"
    for options in _UNSHARE_OPTIONS:
        try:
            holder = subprocess.Popen(
                ["unshare", *options, "--mount", "--propagation", "private", "sleep", "infinity"],
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError:
            break
        try:
            if _entered(holder):
                yield Mounts(holder, options)
                return
            assert holder.stderr
            reason = holder.stderr.read().decode().strip()
        finally:
            holder.kill()
            holder.wait()
            assert holder.stderr
            holder.stderr.close()
    pytest.skip(f"no mount namespace can be created here: {reason}")


@contextmanager
def tmpfs(at: Path, size: str) -> Iterator[Mounts]:
    """Create the directory `at` and mount a tmpfs of the given size there."""
    at.mkdir()
    with mounts() as namespace:
        try:
            namespace.run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", at)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"mounting a tmpfs is not possible here: {error.stderr.decode().strip()}")
        yield namespace


def fill(directory: Path) -> Path:
    """Fill the directory's file system to the last byte, and return the file that does."""
    ballast = directory / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    return ballast


def _entered(holder: subprocess.Popen[bytes]) -> bool:
    """Wait until the holder sleeps in its namespace; return False if it ended instead."""
    program = f"/proc/{holder.pid}/exe"
    wait_until(lambda: holder.poll() is not None or os.path.basename(os.readlink(program)) == "sleep")
    return holder.poll() is None
