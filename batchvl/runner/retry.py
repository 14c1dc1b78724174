"""Asking failed rows again: `batchvl retry`."""

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
    """Asks again the rows of an output folder that failed for reasons that may pass; what `batchvl retry` does.

    codes: instead, those that failed with one of these; all: all that failed. The answers' meaning stays the run's:
    `options` are those of `run` that do not change it. What came before stays in the output; a later result wins, but
    never a failure over an answer. A retry that was stopped goes on where it was. Of several shards each is one run;
    `shard` names one of them. Returns their summaries, none where no row has failed like that; the last one's
    `exit_code` tells why no more came.

    manifest: where the run's manifest is now, unless it is where it was.

    Raises ResumeError where `out` is no output folder, and what `run` raises.
    """
    storage, selection = open_output(out, options.get("work")), RetrySelection.of(codes, all=all)
    run_file = storage.run_file()
    for name in options:
        if name in MEANING:
            raise OptionError(f"{flag(name)}: changes what an answer means: a retry has the run's")
        if name not in RETRY_OPTIONS:
            raise OptionError(f"{flag(name)}: is no option of a retry")
    source, found = resolve_options(_manifest(run_file, storage, manifest), config, options)
    free = {name: value for name, value in found.flat().items() if name in RETRY_OPTIONS}
    chosen = RunOptions.of(**free, **run_file.options, output=os.fspath(out))
    summaries: list[Summary] = []
    for shard in _shards(storage, run_file, found.manifest.shard):
        if not any(map(len, selection.failed(storage.shard(shard).recover().outcomes()).values())):
            continue
        job = Job(source, replace(chosen, manifest=replace(chosen.manifest, shard=shard)), quiet=quiet, retry=selection)
        summaries.append(job.run())
        if summaries[-1].exit_code not in (0, 3):
            break
    return summaries


def _manifest(run_file: RunFile, storage: Storage, named: str | os.PathLike[str] | None) -> str:
    """Where the manifest is: as named, where it was, or beside the output folder. Raises OptionError."""
    if named is not None:
        return os.fspath(named)
    sibling = storage.sibling(Path(run_file.manifest).name)
    for path in (Path(run_file.manifest), *([sibling] if sibling else [])):
        if path.exists() or any(path.parent.glob(path.name)):
            return str(path)
    raise OptionError(f"{storage}: its manifest {run_file.manifest} is not here: say where it is by --manifest")


def _shards(storage: Storage, run_file: RunFile, wanted: Shard) -> list[Shard]:
    """Those that have been begun, or the one that is wanted. Raises ResumeError where the run has no such shard."""
    begun = [folder.shard for folder in storage.shards(run_file.shards)]
    if wanted == Shard():
        return begun
    if wanted.count != run_file.shards:
        raise ResumeError(f"{storage}: has {run_file.shards} shards, and --shard {wanted} is none of them")
    return [shard for shard in begun if shard == wanted]
