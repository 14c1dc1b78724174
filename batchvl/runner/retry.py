"""`batchvl retry`: retry rows that failed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config.options import MEANING, RETRY_OPTIONS, RunOptions, flag
from ..config.sources import resolve_options
from ..config.units import Shard
from ..errors import OptionError, ResumeError
from ..results import RetrySelection, RunFile
from ..results.location import open_output
from ..results.output import Storage
from ..results.remote import stop_on_remote_error
from .job import Job
from .summary import Summary


@stop_on_remote_error()
def retry(
    out: str | os.PathLike[str],
    *,
    codes: Iterable[str] = (),
    all: bool = False,
    manifest: str | os.PathLike[str] | None = None,
    config: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> list[Summary]:
    """Retry failed rows of an output, as `batchvl retry` does. By default those with a retryable error code.

    Earlier results are kept: in merged results an answer replaces a failure, and a later failure an earlier one. A
    retry that was stopped resumes where it was. The shards are retried one after the other.

    Args:
        out: The output directory, or `s3://BUCKET/PREFIX`.
        codes: Error codes of the rows to retry, instead of the retryable ones.
        all: Retry all failed rows.
        manifest: The present location of the manifest, if it has moved.
        config: The TOML job file.
        quiet: Whether to show no progress.
        **options: Options of `run` that do not change what an answer means; `shard` selects one shard. The others are
            those of the run.

    Returns:
        The summary of each shard that had such rows. A shard that is stopped is the last.

    Raises:
        ResumeError: `out` is not the output of a run.
        BatchvlError: Nothing could be run; see `run`.
    """
    storage, selection = open_output(out, options.get("work")), RetrySelection.of(codes, all=all)
    run_file = storage.run_file()
    for name in options:
        if name in MEANING:
            raise OptionError(f"{flag(name)}: not allowed, since it would change what an answer means")
        if name not in RETRY_OPTIONS:
            raise OptionError(f"{flag(name)}: not an option of retry")
    source, resolved = resolve_options(_manifest(run_file, storage, manifest), config, options)
    free = {name: value for name, value in resolved.flat().items() if name in RETRY_OPTIONS}
    run_options = RunOptions.of(**free, **run_file.options, output=os.fspath(out))
    summaries: list[Summary] = []
    for shard in _shards(storage, run_file, resolved.manifest.shard):
        if not any(map(len, selection.failed(storage.shard(shard).recover().outcomes()).values())):
            continue
        shard_options = replace(run_options, manifest=replace(run_options.manifest, shard=shard))
        summaries.append(Job(source, shard_options, quiet=quiet, retry=selection).run())
        if summaries[-1].exit_code not in (0, 3):
            break
    return summaries


def _manifest(run_file: RunFile, storage: Storage, manifest: str | os.PathLike[str] | None) -> str:
    """Return the manifest: as given, where the run found it, or next to the output. Raises OptionError."""
    if manifest is not None:
        return os.fspath(manifest)
    original = Path(run_file.manifest)
    for path in filter(None, (original, storage.sibling(original.name))):
        if path.exists() or any(path.parent.glob(path.name)):
            return str(path)
    raise OptionError(f"{storage}: cannot find its manifest {run_file.manifest}; specify it with --manifest")


def _shards(storage: Storage, run_file: RunFile, selected: Shard) -> list[Shard]:
    """Return the shards that have begun, or the selected one of them. Raises ResumeError if the run has no such shard.

    The default shard selects all.
    """
    begun = [directory.shard for directory in storage.shards(run_file.shards)]
    if selected == Shard():
        return begun
    if selected.count != run_file.shards:
        raise ResumeError(f"{storage}: has {run_file.shards} shards; --shard {selected} is not one of them")
    return [shard for shard in begun if shard == selected]
