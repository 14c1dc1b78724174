"""Validate a whole manifest before a run."""

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
from ..fetching.host_headers import HostHeaders
from ..fetching.network import NetworkGuard
from ..fetching.object_urls import BucketGuard
from ..fetching.url_checker import UrlChecker
from ..images.files import check_roots
from ..manifest import Manifest
from ..results.record import schema
from ..types import Row
from .file_checker import FileChecker
from .probing import Prober
from .report import Probe, Report
from .row_checker import RowChecker
from .sample import AllExcept, Sample
from .survey import Survey


def validate(
    manifest: str | os.PathLike[str] | None = None,
    *,
    probe: int = 0,
    config: str | None = None,
    quiet: bool = False,
    **options: Any,
) -> Report:
    """Check every row of a manifest as `run` would read it, without a model. `batchvl validate` calls this function.

    Columns, ids, prompts, settings and references to images are checked. Image files must exist, but are not opened,
    and URLs are not fetched, except for the images of `probe` random rows. Memory does not grow with the manifest: up
    to 64 bytes per row go to a temporary file in TMPDIR.

    Example:
        report = batchvl.validate("manifest.parquet", probe=100)
        for problem in report.problems:
            print(problem.level, problem.code, problem.rows, problem.examples[0])

    Args:
        manifest: The manifest's path; by default the one that the job file names.
        probe: Number of random rows whose images are fetched and decoded. `seed` chooses them.
        config: A job file (TOML).
        quiet: Show no progress bar.
        **options: Options of `run`.

    Returns:
        Counts, and the first rows that have each kind of problem.

    Raises:
        UsageError: `run` would reject the manifest or the options as a whole: no such file, a missing column.
    """
    if probe < 0:
        raise OptionError(f"--probe: found {probe}, expected a number of rows, or 0 to fetch nothing")
    validation = Validation(*resolve_options(manifest, config, options), probe, quiet=quiet)
    return run_sync(validation.run, validation.interrupt)


class Validation:
    """The validation of one manifest.

    Raises:
        UsageError: A run would reject the manifest or the options as a whole.
    """

    def __init__(self, source: str, options: RunOptions, probe: int, *, quiet: bool = False) -> None:
        self._source, self._options, self._probe_rows = source, options, probe
        self._hide_progress = quiet or not sys.stderr.isatty()
        check_roots(options.fetch.image_root)
        self._guard = NetworkGuard(options.fetch.allow_private, options.fetch.allow_host)
        self._buckets = BucketGuard(options.fetch.allow_bucket)
        HostHeaders.read(options.fetch.host_headers)  # raises OptionError, as a run does
        self._manifest = Manifest.open(source, options.manifest, options.prompt)
        # Raises OptionError if a column of --keep has the name of an output column.
        schema(self._manifest.schema.id_type or "string", self._manifest.schema.kept)
        roots = [str(self._manifest.directory), *options.fetch.image_root]
        self._roots = [Path(os.path.realpath(root)) for root in roots]
        self._task: asyncio.Task[Report] | None = None

    async def run(self) -> Report:
        """Read the rows once, those that seem to be duplicates a second time, and probe some."""
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        started = time.monotonic()
        manifest, options = self._manifest, self._options
        sample = Sample(self._probe_rows, options.sampling.seed)
        unreadable = probe = None
        urls = UrlChecker(self._guard, self._buckets, through_proxy=options.fetch.proxy is not None)
        with FileChecker(self._roots, options.fetch.max_image_bytes) as files:
            checker = RowChecker(options, urls, files)
            with Survey(checker, options.image.look_ahead, sample) as survey:
                try:
                    with self._progress("rows", self._expected_rows()) as progress:
                        await survey.scan(_with_progress(self._rows(), progress))
                except ManifestError as error:
                    unreadable = str(error)
                roles = manifest.roles
                has_images = bool(roles.images or roles.image)
                survey.finish(self._rows, has_ids=manifest.schema.id_type is not None, has_images=has_images)
                if (numbers := sample.numbers()) and unreadable is None:
                    probe = await self._probe(numbers, checker)
                return Report(
                    manifest=self._source,
                    format=manifest.files.format,
                    files=sum(1 for _ in manifest.files),
                    rows=survey.rows,
                    failing=survey.failing,
                    unreadable=unreadable,
                    roles={role: name for role, name in asdict(roles).items() if name},
                    ignored=tuple(name for name in manifest.columns if name not in roles.names),
                    ids=survey.ids(manifest.schema.id_type),
                    prompts=survey.prompts(),
                    images=survey.images(),
                    sharing=survey.sharing(),
                    problems=survey.problems.ranked(),
                    probe=probe,
                    seconds=round(time.monotonic() - started, 3),
                )

    def interrupt(self) -> None:
        """Cancel `run` from another thread. Raises KeyboardInterrupt."""
        if self._task is not None:
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._task.cancel)
        raise KeyboardInterrupt

    async def _probe(self, numbers: frozenset[int], checker: RowChecker) -> Probe:
        async with Prober(self._options, self._roots, checker.request) as prober:
            with self._progress("rows fetched", len(numbers)) as progress:
                return await prober.run(self._rows(AllExcept(numbers)), progress.update)

    def _rows(self, skip: Container[int] = ()) -> Iterator[list[Row]]:
        return self._manifest.rows(self._options.manifest.shard, skip)

    def _expected_rows(self) -> int | None:
        total, shard = self._manifest.estimate(), self._options.manifest.shard
        return None if total is None else len(shard.rows(total))

    def _progress(self, unit: str, total: int | None) -> tqdm[Any]:
        return tqdm(total=total, unit=f" {unit}", dynamic_ncols=True, leave=False, disable=self._hide_progress)


def _with_progress(chunks: Iterator[list[Row]], progress: tqdm[Any]) -> Iterator[list[Row]]:
    for rows in chunks:
        yield rows
        progress.update(len(rows))
