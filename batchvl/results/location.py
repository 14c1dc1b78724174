"""Where an output lies: a folder, or a prefix on an object store; by default a folder beside the manifest."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from ..config.options import env_variable
from ..errors import OptionError
from ..storage.object_store import SCHEMES
from .remote import Remote

_COLLAPSED = re.compile(rf"^({'|'.join(SCHEMES)}):/(?!/)")


def open_output(out: str | os.PathLike[str] | Remote, work: str | os.PathLike[str] | None = None) -> Path | Remote:
    """Where an output lies: a folder, or a prefix on an object store. Asks nothing of it yet.

    work: for the latter, the folder for working folders; by default that of `BATCHVL_WORK`, else
    `~/.local/state/batchvl`.
    Raises OptionError for an address of a kind that cannot hold an output.

    >>> open_output("night"), str(open_output("s3://bucket/night", "/scratch"))
    (PosixPath('night'), 's3://bucket/night')
    """
    if isinstance(out, Remote):
        return out
    uri = _COLLAPSED.sub(r"\1://", os.fspath(out))  # a Path has made one slash of two
    scheme, found, _ = uri.partition("://")
    if not found:
        return Path(uri)
    if scheme not in SCHEMES:
        raise OptionError(f"-o {scheme}://…: wants a folder, or an address that begins with {'://, '.join(SCHEMES)}://")
    return Remote(uri, Path(work) if work is not None else _state())


def default_output(source: str) -> str:
    """The default output folder: beside the manifest, named after it.

    >>> default_output("data/m.jsonl.gz"), default_output("pictures/"), default_output("data/*/day-*.parquet")
    ('data/m-batchvl', 'pictures-batchvl', 'data/day-batchvl')
    """
    path = Path(source)
    if glob.has_magic(source) and not path.exists():
        literal = [glob.has_magic(part) for part in path.parts].index(True)
        words = re.sub(r"[*?\[\]]+", "_", "_".join(path.parts[literal:]))
        path = Path(*path.parts[:literal], words)
    elif path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    name = path.name
    for suffix in (".gz", ".zst", ".parquet", ".jsonl", ".ndjson", ".csv"):
        name = name.removesuffix(suffix)
    return str(path.with_name(f"{name.strip('_-.') or 'manifest'}-batchvl"))


def _state() -> Path:
    """Where programs keep what is neither settings nor cache, by the XDG specification, unless told otherwise."""
    if told := os.environ.get(env_variable("work")):
        return Path(told)
    if (given := Path(os.environ.get("XDG_STATE_HOME", ""))).is_absolute():
        return given / "batchvl"
    try:
        return Path.home() / ".local" / "state" / "batchvl"
    except RuntimeError:
        raise OptionError("--work: there is no home folder: name a folder for the journals") from None
