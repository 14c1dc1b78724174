"""The sources of options: flags, environment variables and a TOML job file, in this order of precedence."""

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
    """Combine all sources.

    Args:
        manifest: The manifest that the command names, if any; it has precedence over the job file's.
        config: Path of the job file. By default, a file `batchvl.toml` next to the manifest is read if it exists.
        options: Values of flags or keyword arguments; None and () mean not given.

    Returns:
        The manifest and the options.

    Raises:
        OptionError: A value is invalid, or no source names a manifest.
    """
    job = read_job_file(config) if config else {}
    job_manifest = job.pop("manifest", None)
    if manifest is not None and not isinstance(manifest, str | os.PathLike):
        raise OptionError(f"manifest: expected a path or a glob; found {manifest!r:.80}")
    source = os.fspath(manifest) if manifest is not None else job_manifest
    if source is None:
        raise OptionError("no manifest: name one, or set `manifest = …` in the job file of --config")
    default_file = Path(source).parent / JOB_FILE
    if not config and default_file.is_file():
        job = {name: value for name, value in read_job_file(default_file).items() if name != "manifest"}
    return source, RunOptions.of(**merge_sources(options, os.environ, job))


def merge_sources(flags: Mapping[str, Any], environment: Mapping[str, str], job: Mapping[str, Any]) -> dict[str, Any]:
    """Merge values by precedence: flags, then `BATCHVL_*` variables, then the job file.

    None, () and empty variables mean not given.

    Returns:
        Values by the options' names.

    Raises:
        OptionError: A variable's value is invalid.
    """
    values = dict(job)
    for name in NAMES:
        if text := environment.get(env_variable(name)):
            values[name] = convert(name, text, env_variable(name))
    return values | {name: value for name, value in flags.items() if value is not None and value != ()}


def read_job_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the options in a TOML job file, and its `manifest` if it names one.

    Relative paths are resolved against the directory of the file.

    Raises:
        OptionError: The file cannot be read, is not TOML, or has an unknown option or an invalid value.
    """
    file = Path(path)
    try:
        job = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"{file}: cannot read the job file: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: not valid TOML: {error}") from None
    job = {name.replace("-", "_"): value for name, value in job.items()}
    for name in job:
        if name != "manifest" and name not in NAMES:
            raise OptionError(f"{file}: unknown option {name!r}; the options are {', '.join(sorted(NAMES))}")
    for name, value in job.items():
        job[name] = convert(name, value, f"{file}: {name}") if name != "manifest" else str(value)
    for name in ("manifest", "output"):
        if name in job and "://" not in job[name]:
            job[name] = str(file.parent / job[name])
    if "host_headers" in job:
        job["host_headers"] = str(file.parent / job["host_headers"])
    if "image_root" in job:
        job["image_root"] = tuple(str(file.parent / root) for root in job["image_root"])
    return job
