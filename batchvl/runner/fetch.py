"""`batchvl fetch`: fetch and check the images of a manifest, into files that a run reads where there is no network."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

from .._version import __version__
from ..concurrency import run_sync
from ..config.options import FETCH_COMMAND_OPTIONS, FILE_FORMATS, FileFormat, flag
from ..config.sources import resolve_options
from ..config.units import Size, pluralize
from ..errors import OptionError, UsageError
from ..images.pipeline import ImagePipeline
from ..manifest import Manifest
from ..results import Counts, RetrySelection, RunFile
from ..results.fetched_files import complete_files, read_records, remove_incomplete_files
from ..results.fetched_rows import FileSchema
from ..results.image_writer import ImageWriter
from ..results.location import open_output
from ..results.rowset import RowSet
from ..storage.disk import Disk, as_stopped_early
from ..types import Request, Row
from .execution import Execution, Task
from .fetch_columns import FetchedColumns
from .fetch_loop import FetchLoop
from .progress import FetchProgress
from .summary import FetchSummary, summarise_fetch

logger = logging.getLogger(__name__)

RECORDS = "_fetch"
"""The directory of records in the output. A manifest's directory is searched without names that begin with `_`."""
FILE_BYTES = Size(512 * 2**20)
_COLUMN_OPTIONS = ("image_column", "messages_column", "prompt_column")


def fetch(
    manifest: str | os.PathLike[str] | None = None,
    *,
    format: FileFormat = "parquet",
    file_bytes: int | str = FILE_BYTES,
    decode: bool = True,
    retry: bool = False,
    config: str | None = None,
    quiet: bool = False,
    disk: Disk | None = None,
    **options: Any,
) -> FetchSummary:
    """Fetch and check the images of a manifest, as `batchvl fetch` does, into files that `batchvl.run` reads.

    Args:
        manifest: The manifest: a file, a directory of images, or a glob pattern.
        format: Where the images are: in Parquet files with the rows, or in tars that Parquet files of rows point at.
        file_bytes: Size of a file of images.
        decode: Whether images are decoded to check them.
        retry: Whether to fetch only rows again that failed with a retryable error code.
        config: The TOML job file.
        quiet: Whether to show no progress.
        disk: Writes the files.
        **options: The options of the command, with underscores. `output` is the directory of the files.

    Returns:
        The summary. If the fetch ended early or rows failed, its `exit_code` and `message` say so.

    Raises:
        BatchvlError: Nothing could be fetched.

    Example:
        batchvl.fetch("manifest.parquet", output="fetched")
        batchvl.run("fetched", model="shapes")
    """
    for name in options:
        if name not in FETCH_COMMAND_OPTIONS:
            raise OptionError(f"{flag(name)}: not an option of fetch")
    if format not in FILE_FORMATS:
        raise OptionError(f"--format: expected {' or '.join(FILE_FORMATS)}; found {format!r}")
    try:
        size = Size.parse(file_bytes)
    except ValueError as error:
        raise OptionError(f"--file-bytes: {error}; found {file_bytes!r}") from None
    source, resolved = resolve_options(manifest, config, options)
    output = resolved.output.output
    if output is None or "://" in output:
        raise OptionError("-o: expected a directory on a disk, for the files of images")
    directory = Path(output)
    task = Task(source, resolved, open_output(directory / RECORDS), quiet, RetrySelection.of() if retry else None, disk)
    task.check()
    whole = Manifest.open_whole(source, resolved.manifest)
    whole.check()
    execution = _FetchExecution(task, whole, directory, format=format, file_bytes=size, decode=decode)
    try:
        return run_sync(execution.run, execution.stopper.interrupt)
    except UsageError:
        with suppress(OSError):
            directory.rmdir()  # if it is empty
        raise


class _FetchExecution(Execution[FetchSummary]):
    """One execution of a fetch."""

    progress: FetchProgress

    def __init__(
        self, task: Task, manifest: Manifest, directory: Path, *, format: FileFormat, file_bytes: int, decode: bool
    ) -> None:
        super().__init__(task, manifest)
        self._directory, self._file_bytes, self._decode = directory, file_bytes, decode
        self._columns = FetchedColumns(manifest, format)
        self._schema = FileSchema(
            self._columns.schema, self._columns.images, self._columns.has_lists, manifest.roles.id, format
        )
        self._disk = task.disk or Disk()
        self._files = 0
        """Complete files of the shard."""

    def run_file(self) -> RunFile:
        meaning = self.options.meaning()
        return RunFile(
            self.manifest.fingerprint,
            {name: meaning[name] for name in _COLUMN_OPTIONS} | {"decode": self._decode, "format": self._schema.format},
            self.task.shard.count,
            self.manifest.schema.id_type,
            pa.schema([("file", pa.string())]),
            self.task.source,
            self.manifest.total,
        )

    def make_progress(self, before: Counts) -> FetchProgress:
        return FetchProgress(self.expected, before, quiet=self.task.quiet)

    def describe_stop(self, left: int, grace: float) -> str:
        return "no new rows; completing the file with those that have arrived"

    def summarise(self, expected: int | None, results: str | None) -> FetchSummary:
        return summarise_fetch(
            self.progress,
            self._files,
            manifest=self.task.source,
            output=str(self._directory),
            expected=expected,
            results=results,
        )

    def opened(self) -> None:
        """Make the records agree with the files: rows are fetched if they are in a complete file."""
        remove_incomplete_files(self._directory, self.task.shard, self.store.attempt, self._disk)
        stored, store, files = RowSet(), self.store, self._complete_files()
        self._files = len(files)
        for path, rows in files.items():
            missing = rows - stored - store.outcomes.ok  # their process was killed before it recorded them
            stored |= rows
            store.reopen(missing)
            for record in read_records(path, missing, self._schema):
                store.add(record)
        lost = store.outcomes.ok - stored
        store.reopen(lost)
        store.done |= stored
        if len(lost):
            logger.warning(f"{pluralize(len(lost), 'row')} of files that are gone: fetching them again")
        self._announce()

    def _complete_files(self) -> dict[Path, RowSet]:
        try:
            return dict(
                complete_files(self._directory, self.task.shard, self.manifest.fingerprint, self._schema.format)
            )
        except OSError as error:
            raise as_stopped_early(self._directory, error) from error

    def _announce(self) -> None:
        """Say what is fetched, and what is not."""
        columns, roles, total = self._columns, self.manifest.roles, self.expected()
        sources = [f"column {name!r}" for name in (roles.images, roles.image) if name]
        sources += ["the messages"] if roles.messages else []
        done = f", {len(self.store.done):,} of them done before" if len(self.store.done) else ""
        rows = "all rows" if total is None else pluralize(total)
        check = "decoded to check them" if self._decode else "not decoded"
        logger.info(f"fetching the images of {' and '.join(sources)}, {check}: {rows}{done}")
        copied = [name for name in columns.schema.names[1:] if name != roles.messages]
        if copied:
            logger.info(f"copied as they are: {', '.join(copied)}")
        if columns.images not in ("images", "image"):  # a run would not see that these are images
            words = ["batchvl", "run", str(self._directory), "--image-column", columns.images]
            logger.info(f"to read them: {shlex.join(words)}")
        files = "tars" if self._schema.format == "tar" else "files"
        logger.info(f"{files} of {Size(self._file_bytes)} in {self._directory}, records in {self.task.output}")

    async def process(self) -> None:
        async with AsyncExitStack() as stack:
            with self.stopper.cancel_task():
                images = await stack.enter_async_context(self._open_images())
            writer = ImageWriter(
                self._directory,
                self.task.shard,
                self.store.attempt,
                self._schema,
                self.manifest.fingerprint,
                file_bytes=self._file_bytes,
                disk=self._disk,
            )
            loop = FetchLoop(
                images,
                self._columns,
                writer,
                self.store,
                self.progress,
                look_ahead=self.options.image.look_ahead,
                decode=self._decode,
            )
            try:
                with self.stoppable(loop):
                    await loop.run(self.rows)
            finally:
                self._files += writer.files
        if loop.stopped is not None:
            raise loop.stopped

    @asynccontextmanager
    async def _open_images(self) -> AsyncIterator[ImagePipeline]:
        async with AsyncExitStack() as stack:
            self.store.describe({"batchvl": __version__, "id_column": self.options.manifest.id_column})
            images = await self.open_images(stack)
            await images.load(None, _request)
            self.progress.engine_up()
            yield images


def _request(row: Row) -> Request:
    """Return a request about the row's images alone: prompts are left to the run."""
    return Request(row.number, ())
