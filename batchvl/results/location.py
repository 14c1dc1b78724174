"""Where an output is stored: a directory (by default next to the manifest) or a prefix on an object store."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ..config.options import env_variable
from ..errors import OptionError
from ..storage.object_store import SCHEMES
from .output import LocalStorage, Storage
from .remote import RemoteStorage

_COLLAPSED = re.compile(rf"^({'|'.join(SCHEMES)}):/(?!/)")


def open_output(out: str | os.PathLike[str] | Storage, work: str | os.PathLike[str] | None = None) -> Storage:
    """Return the storage of an output, without any access to it.

    Args:
        out: A directory, or a URI such as `s3://bucket/prefix`.
        work: For a URI, the parent of all working directories; by default `BATCHVL_WORK`, else
            `~/.local/state/batchvl`.

    Raises:
        OptionError: a URI whose scheme cannot hold an output.

    >>> str(open_output("night")), str(open_output("s3://bucket/night", "/scratch"))
    ('night', 's3://bucket/night')
    """
    if isinstance(out, Storage):
        return out
    uri = _COLLAPSED.sub(r"\1://", os.fspath(out))  # a Path has collapsed the two slashes
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return LocalStorage(Path(uri))
    if scheme not in SCHEMES:
        raise OptionError(f"-o {scheme}://…: expected a directory or a URI that starts with {'://, '.join(SCHEMES)}://")
    return RemoteStorage(uri, Path(work) if work is not None else _default_work_directory())


def default_output(source: str) -> str:
    """Return the default output directory: next to the manifest, named after it.

    >>> default_output("data/m.jsonl.gz"), default_output("images/"), default_output("data/*/day-*.parquet")
    ('data/m-batchvl', 'images-batchvl', 'data/day-batchvl')
    """
    path = Path(source)
    if glob.has_magic(source) and not path.exists():
        first = [glob.has_magic(part) for part in path.parts].index(True)
        words = re.sub(r"[*?\[\]]+", "_", "_".join(path.parts[first:]))
        path = Path(*path.parts[:first], words)
    elif path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    name = path.name
    for suffix in (".gz", ".zst", ".parquet", ".jsonl", ".ndjson", ".csv", ".tar"):
        name = name.removesuffix(suffix)
    return str(path.with_name(f"{name.strip('_-.') or 'manifest'}-batchvl"))


def _default_work_directory() -> Path:
    """Return the directory for state that is neither configuration nor cache (XDG Base Directory Specification)."""
    if configured := os.environ.get(env_variable("work")):
        return Path(configured)
    if (xdg_state := Path(os.environ.get("XDG_STATE_HOME", ""))).is_absolute():
        return xdg_state / "batchvl"
    try:
        return Path.home() / ".local" / "state" / "batchvl"
    except RuntimeError:
        raise OptionError("--work: no home directory found: specify a directory for the journals") from None
