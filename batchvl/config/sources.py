"""Where options come from: flags, the environment, a TOML job file."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .options import NAMES, RunOptions, convert, env_variable

JOB_FILE = "batchvl.toml"


def resolve_options(
    manifest: str | os.PathLike[str] | None, config: str | None, options: dict[str, Any]
) -> tuple[str, RunOptions]:
    """What a run was told, all places taken together: the manifest, and every option. Raises OptionError."""
    job = read_job_file(config) if config else {}
    named = job.pop("manifest", None)
    if manifest is not None and not isinstance(manifest, str | os.PathLike):
        raise OptionError(f"the manifest is a path or a glob; found {manifest!r:.80}")
    source = os.fspath(manifest) if manifest is not None else named
    if source is None:
        raise OptionError("no manifest: name one, or write `manifest = ...` into the job file of --config")
    beside = Path(source).parent / JOB_FILE
    if not config and beside.is_file():
        job = {name: value for name, value in read_job_file(beside).items() if name != "manifest"}
    return source, RunOptions.of(**merge_sources(options, os.environ, job))


def merge_sources(
    flags: Mapping[str, Any], environment: Mapping[str, str], job: Mapping[str, Any]
) -> dict[str, Any]:  # fmt: skip
    """Flat values by precedence: flags, then BATCHVL_* variables, then the job file.

    None and () mean not given, and so does an empty variable. Raises OptionError for a variable's value.
    """
    values = dict(job)
    values |= {n: convert(n, text, env_variable(n)) for n in NAMES if (text := environment.get(env_variable(n)))}
    values |= {name: value for name, value in flags.items() if value is not None and value != ()}
    return values


def read_job_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of a TOML job file, and its `manifest` if it names one.

    Raises OptionError where the file is missing, is not TOML, names an unknown option or has a value that it cannot
    have. Paths are relative to the file.
    """
    file = Path(path)
    try:
        job = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{file}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: is not TOML: {error}") from None
    job = {name.replace("-", "_"): value for name, value in job.items()}
    for name in job:
        if name != "manifest" and name not in NAMES:
            raise OptionError(f"{file}: unknown option {name!r}; the options are {', '.join(sorted(NAMES))}")
    for name, value in job.items():
        job[name] = convert(name, value, f"{file}: {name}") if name != "manifest" else str(value)
    for name in ("manifest", "output"):
        if name in job and "://" not in job[name]:
            job[name] = str(file.parent / job[name])
    if "image_root" in job:
        job["image_root"] = tuple(str(file.parent / root) for root in job["image_root"])
    return job
