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
from ..results.remote import Remote, answering
from ..results.shard import ShardFolder
from .job import Job
from .summary import Summary


@answering()
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
    folder, redo = open_output(out, options.get("work")), RetrySelection.of(codes, all=all)
    guard = RunFile.read(folder)
    for name in options:
        if name in MEANING:
            raise OptionError(f"{flag(name)}: changes what an answer means: a retry has the run's")
        if name not in RETRY_OPTIONS:
            raise OptionError(f"{flag(name)}: is no option of a retry")
    source, found = resolve_options(_manifest(guard, folder, manifest), config, options)
    free = {name: value for name, value in found.flat().items() if name in RETRY_OPTIONS}
    chosen = RunOptions.of(**free, **guard.options, output=os.fspath(out))
    summaries: list[Summary] = []
    for shard in _shards(folder, guard, found.manifest.shard):
        if not any(map(len, redo.failed(ShardFolder.of(folder, shard).recover().tally()).values())):
            continue
        job = Job(source, replace(chosen, manifest=replace(chosen.manifest, shard=shard)), quiet=quiet, redo=redo)
        summaries.append(job.run())
        if summaries[-1].exit_code not in (0, 3):
            break
    return summaries


def _manifest(guard: RunFile, out: Path | Remote, named: str | os.PathLike[str] | None) -> str:
    """Where the manifest is: as named, where it was, or beside the output folder. Raises OptionError."""
    if named is not None:
        return os.fspath(named)
    beside = [out.parent / Path(guard.manifest).name] if isinstance(out, Path) else []
    for place in (Path(guard.manifest), *beside):
        if place.exists() or any(place.parent.glob(place.name)):
            return str(place)
    raise OptionError(f"{out}: its manifest {guard.manifest} is not here: say where it is by --manifest")


def _shards(out: Path | Remote, guard: RunFile, wanted: Shard) -> list[Shard]:
    """Those that have been begun, or the one that is wanted. Raises ResumeError where the run has no such shard."""
    begun = [folder.shard for folder in ShardFolder.all(out, guard.shards)]
    if wanted == Shard():
        return begun
    if wanted.count != guard.shards:
        raise ResumeError(f"{out}: has {guard.shards} shards, and --shard {wanted} is none of them")
    return [shard for shard in begun if shard == wanted]
