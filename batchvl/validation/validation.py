"""A whole manifest looked at before anything is paid for: `validate`."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..concurrency import run_sync
from ..config.options import RunOptions
from ..config.sources import resolve_options
from ..errors import ManifestError, OptionError
from ..images.files import check_roots
from ..images.network import NetworkGuard
from ..images.url_checker import UrlChecker
from ..manifest import Manifest
from ..results.record import schema
from ..types import Row
from .checks import Checks
from .paths import Paths
from .probing import Prober
from .report import Probe, Report
from .sample import AllExcept, Sample
from .survey import Survey

__all__ = ["Report", "validate"]


def validate(
    manifest: str | os.PathLike[str] | None = None,
    *,
    probe: int = 0,
    config: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Report:
    """Looks at every row of a manifest without a model, as `run` would read it: what `batchvl validate` does.

    Columns, ids, prompts, settings and references of pictures are checked; files are looked for, no picture is opened,
    and nothing is fetched, but for the pictures of `probe` rows, drawn at random by `seed`. Options are those of `run`.
    Memory does not grow with the manifest: 64 bytes a row go to a temporary file in TMPDIR.

    Raises a UsageError for what `run` would refuse by its options and columns: no such manifest, a column missing.

    Example:

        report = batchvl.validate("manifest.parquet", probe=100)
        for problem in report.problems:
            print(problem.level, problem.code, problem.rows, problem.examples[0])
    """
    if probe < 0:
        raise OptionError(f"--probe: found {probe}, want a number of rows, or 0 to fetch nothing")
    validation = Validation(*resolve_options(manifest, config, options), probe, quiet=quiet)
    return run_sync(validation.run, validation.interrupt)


class Validation:
    """One look at a manifest. Raises a UsageError for what a run would refuse."""

    def __init__(self, source: str, options: RunOptions, probe: int, *, quiet: bool = False) -> None:
        self._source, self._options, self._probe_rows = source, options, probe
        self._hidden = quiet or not sys.stderr.isatty()
        check_roots(options.fetch.image_root)
        self._guard = NetworkGuard(options.fetch.allow_private)
        self._manifest = Manifest.open(source, options.manifest, options.prompt)
        schema(self._manifest.schema.id_type or "string", self._manifest.schema.kept)
        roots = [str(self._manifest.folder), *options.fetch.image_root]
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._task: asyncio.Task[Report] | None = None

    async def run(self) -> Report:
        """Goes over the rows, once more over those that seem to be there twice, and fetches some."""
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        started = time.monotonic()
        manifest, options = self._manifest, self._options
        sample = Sample(self._probe_rows, options.sampling.seed)
        unreadable = probe = None
        async with UrlChecker(self._guard) as reach:
            with Paths(self._roots, options.fetch.max_image_bytes) as paths:
                checks = Checks(options, reach, paths)
                with Survey(checks, options.image.look_ahead, sample) as survey:
                    try:
                        with self._bar("rows", self._expected()) as bar:
                            await survey.go(_counted(self._rows(), bar))
                    except ManifestError as error:
                        unreadable = str(error)
                    roles = manifest.roles
                    survey.end(
                        self._rows, has_ids=manifest.schema.id_type is not None,
                        wants_pictures=bool(roles.images or roles.image),
                    )  # fmt: skip
                    if (numbers := sample.numbers()) and unreadable is None:
                        probe = await self._probe(numbers, checks)
                    return Report(
                        manifest=self._source,
                        format=manifest.files.format,
                        files=sum(1 for _ in manifest.files),
                        rows=survey.rows,
                        failing=survey.failing,
                        unreadable=unreadable,
                        roles={role: name for role, name in asdict(roles).items() if name},
                        ignored=tuple(name for name in manifest.columns if name not in roles.read),
                        ids=survey.ids(manifest.schema.id_type),
                        prompts=survey.prompts(),
                        pictures=survey.pictures(),
                        sharing=survey.sharing(),
                        problems=survey.problems.found(),
                        probe=probe,
                        seconds=round(time.monotonic() - started, 3),
                    )

    def interrupt(self) -> None:
        """Ends `run` early, from another thread. Raises KeyboardInterrupt."""
        if self._task is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._task.cancel)
        raise KeyboardInterrupt

    async def _probe(self, numbers: frozenset[int], checks: Checks) -> Probe:
        async with Prober(self._options, self._roots, checks) as prober:
            with self._bar("rows fetched", len(numbers)) as bar:
                return await prober.of(self._rows(AllExcept(numbers)), bar.update)

    def _rows(self, skip: Container[int] = ()) -> Iterator[list[Row]]:
        return self._manifest.rows(self._options.manifest.shard, skip)

    def _expected(self) -> int | None:
        total, shard = self._manifest.estimate(), self._options.manifest.shard
        return None if total is None else len(shard.rows(total))

    def _bar(self, what: str, total: int | None) -> tqdm[Any]:
        return tqdm(total=total, unit=f" {what}", dynamic_ncols=True, leave=False, disable=self._hidden)


def _counted(chunks: Iterator[list[Row]], bar: tqdm[Any]) -> Iterator[list[Row]]:
    for rows in chunks:
        yield rows
        bar.update(len(rows))
