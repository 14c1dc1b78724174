"""The results of one shard, as the runner sees them."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import msgspec

from ..config.options import OutputOptions
from ..config.units import Shard
from ..errors import BatchvlError, OptionError
from ..storage.disk import FAILING, Disk, as_stopped_early
from ..storage.object_store import RemoteError
from .attempt import Attempt
from .location import open_output
from .output import LocalStorage, Storage
from .record import Counts, Record
from .retry_selection import RetrySelection
from .rowset import Outcomes, RowSet
from .run_file import RUN_FILE, RunFile
from .shard import Recovered
from .writer import OnCommit, Writer


class ResultStore:
    """Records in, files out. Opened before the engine starts, since the rows that are done decide whether to start it.

    >>> import asyncio, tempfile
    >>> async def example(directory: Path) -> int:
    ...     results = ResultStore.open(directory, RunFile("f1", {}, total=2))
    ...     results.describe({"engine": "fake"})
    ...     results.add(Record(0, "ok", response="a cat"))
    ...     await results.wait_for_capacity()
    ...     await results.close()
    ...     return len(ResultStore.open(directory, RunFile("f1", {})).done)
    >>> asyncio.run(example(Path(tempfile.mkdtemp())))
    1
    """

    done: RowSet
    """The rows that earlier attempts recorded, ok and failed; does not grow with this attempt's rows."""
    counts: Counts
    """The number of these rows, by outcome."""
    outcomes: Outcomes
    """What earlier attempts recorded, of all rows."""
    retry_rows: RowSet | None
    """In a retry, the rows to retry. These are neither in `done` nor counted; all other rows before the last are."""

    def __init__(
        self,
        run_file: RunFile,
        attempt: Attempt,
        writer: Writer,
        done: RowSet,
        counts: Counts,
        retry_rows: RowSet | None,
        outcomes: Outcomes,
    ) -> None:
        self._run_file, self._attempt, self._writer = run_file, attempt, writer
        self.done, self.counts, self.retry_rows, self.outcomes = done, counts, retry_rows, outcomes

    @classmethod
    def open(
        cls,
        out: str | os.PathLike[str] | Storage,
        run_file: RunFile,
        shard: Shard | None = None,
        *,
        options: OutputOptions | None = None,
        on_commit: OnCommit | None = None,
        retry: RetrySelection | None = None,
        disk: Disk | None = None,
    ) -> ResultStore:
        """Take the shard's lock, check `run.json`, take an attempt number and find the rows that are done. Blocks.

        Args:
            out: The output.
            run_file: The run's identity.
            shard: The shard; by default the first one.
            options: By default the options' defaults.
            on_commit: Called on the event loop's thread with the counts of the rows that have just become durable.
            retry: Selects failed rows to retry; their new results take precedence over the earlier ones.
            disk: Writes the files.

        Raises:
            ResumeError: the output belongs to another run or has an active runner, or files are damaged or too new.
            OptionError: the name of a kept column is taken, or the output cannot be created or written.
            StoppedEarly: the disk is full or failing.
        """
        storage = open_output(out)
        shard, options, disk = shard or Shard(0, run_file.shards), options or OutputOptions(), disk or Disk()
        schema = run_file.schema
        attempt = _open_attempt(storage, run_file, shard, retry, disk)
        with _release_on_error(attempt):
            attempt.directory.recover_local(schema, _run_metadata(run_file), disk)
            recovered = attempt.directory.recover()
            outcomes = recovered.outcomes()
        writer = Writer(
            attempt,
            schema,
            commit_seconds=options.commit_seconds,
            part_rows=options.part_rows,
            disk=disk,
            part_seconds=options.upload_seconds if storage.uploads_parts else None,
            on_commit=on_commit,
        )
        done, counts, retry_rows = outcomes.rows(), outcomes.counts(), None
        if retry is not None:
            done, counts, retry_rows = _select_retry(retry, attempt.retry, recovered, outcomes)
        return cls(run_file, attempt, writer, done, counts, retry_rows, outcomes)

    @property
    def complete(self) -> bool:
        """Whether earlier attempts did all rows of the shard, if `total` is known."""
        total = self.total
        if total is None:
            return False
        rows = self._attempt.directory.shard.rows(total)
        return self.done.count(rows) == len(rows)

    @property
    def total(self) -> int | None:
        """Number of rows in the manifest: from the run file, or as counted by an attempt that reached the end."""
        if self._run_file.total is None and (completed := self._attempt.directory.complete()) is not None:
            return completed.total
        return self._run_file.total

    @property
    def directory(self) -> Path:
        """The shard's directory."""
        return self._attempt.directory.path

    @property
    def attempt(self) -> int:
        """The attempt's number, from 1."""
        return self._attempt.number

    def describe(self, metadata: Mapping[str, str]) -> None:
        """Set the run's metadata: version, engine and so on. No part is made before this call.

        The fingerprint and the options are added. Raises StoppedEarly.
        """
        try:
            self._attempt.describe(metadata)
        except OSError as error:
            raise as_stopped_early(self.directory, error) from error
        self._writer.describe({**metadata, **_run_metadata(self._run_file)})

    def heartbeat(self, total: int | None) -> None:
        """Show that the runner is alive, even if it has nothing to write. Thread-safe.

        Args:
            total: Number of rows in the manifest, possibly estimated.
        """
        try:
            self._attempt.heartbeat(total)
        except (OSError, BatchvlError):
            pass  # the next commit or part reports the failure

    def reopen(self, rows: RowSet) -> None:
        """Take rows out of `done` and `counts`, since they are recorded once more."""
        counted = rows if self.retry_rows is None else rows - self.retry_rows
        self.counts.ok -= len(counted & self.outcomes.ok)
        for code, failed in self.outcomes.failed.items():
            if again := len(counted & failed):
                self.counts.failed[code] -= again
        self.counts.failed = {code: number for code, number in self.counts.failed.items() if number}
        self.done -= rows

    def add(self, record: Record) -> None:
        """Add a row's result. Takes microseconds and never waits; `on_commit` reports when it is durable.

        Call it on the event loop's thread, after `await wait_for_capacity()`. Raises StoppedEarly once a write has
        failed.
        """
        self._writer.add(record)

    async def wait_for_capacity(self) -> None:
        """Return once at most 32 MiB are waiting to be written. Raises StoppedEarly once a write has failed."""
        await self._writer.wait_for_capacity()

    async def close(self, complete: bool = False, total: int | None = None) -> None:
        """Commit all records, make the last part and release the lock, even after an error.

        Args:
            complete: Whether the end of the shard was reached.
            total: Number of rows in the manifest, if it was not known before.

        Raises:
            StoppedEarly: not everything could be written. Rows reported to `on_commit` are safe.
            ResumeError: the output belongs to another run by now. The same rows are safe, on this machine.
        """
        try:
            await self._writer.close()
            if complete:
                if self.retry_rows is not None:
                    self._attempt.mark_retry_ended()
                else:
                    self._attempt.mark_complete(self._run_file.total if total is None else total)
            elif total is not None and self.retry_rows is None:
                self._attempt.set_total(total)
            await asyncio.to_thread(self._attempt.finish)
        except OSError as error:
            raise as_stopped_early(self.directory, error) from error
        finally:
            self._attempt.release()

    def roll_back(self, *, logs: bool) -> None:
        """Remove the files of this attempt after `close` if no attempt has ever recorded a row.

        Thus a run that could not start does not bind later ones to its settings.

        Args:
            logs: Whether to keep the logs and the attempt's file, which may explain the failure.
        """
        shard = self._attempt.directory
        try:
            if any(True for _ in shard.sources()):
                return
            shard.delete_attempt(self.attempt)
        except RemoteError:
            return  # the store does not respond: the settings stay bound
        local, number = LocalStorage(shard.path.parent), f"{self.attempt:04d}"
        if not logs:
            engine_logs = shard.path.glob(f"engine-{number}-*.log")
            for path in (shard.path / f"attempt-{number}.json", *shard.path.glob(f"*-{number}.log"), *engine_logs):
                path.unlink(missing_ok=True)
            if {path.name for path in shard.path.iterdir()} <= {"lock"}:
                (shard.path / "lock").unlink(missing_ok=True)
                shard.path.rmdir()
        if all(other.path == shard.path for other in local.shards()):
            (local.path / RUN_FILE).unlink(missing_ok=True)


def _open_attempt(
    storage: Storage, run_file: RunFile, shard: Shard, retry: RetrySelection | None, disk: Disk
) -> Attempt:
    """Create or check the output and begin an attempt at the shard."""
    try:
        storage.create_or_verify(run_file, disk)
        directory = storage.shard(shard)
        if retry is None:
            return Attempt(directory, retry=0, total=run_file.total, disk=disk)
        number = retry.retry_number(directory)
        return Attempt(directory, retry=number, total=None, disk=disk, codes=retry.codes_json)
    except OSError as error:
        # A disk that was writable and is read-only now has failed; one that never was is a wrong option.
        was_writable = (storage.path / RUN_FILE).exists()
        if error.errno in FAILING or (error.errno == errno.EROFS and was_writable):
            raise as_stopped_early(storage, error) from error
        raise OptionError(f"-o {storage}: cannot be written: {error.strerror}") from error


@contextmanager
def _release_on_error(attempt: Attempt) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        attempt.release()
        if isinstance(error, OSError):
            raise as_stopped_early(attempt.directory.path, error) from error
        raise


def _select_retry(
    retry: RetrySelection, number: int, recovered: Recovered, outcomes: Outcomes
) -> tuple[RowSet, Counts, RowSet]:
    """Return the rows that are done, their counts, and the rows to retry."""
    remaining = retry.remaining(outcomes, recovered.of_retry(number))
    retry_rows = Outcomes(failed=remaining).rows()
    counts = outcomes.counts()
    failed = {code: rows - len(remaining.get(code, ())) for code, rows in counts.failed.items()}
    counts.failed = {code: rows for code, rows in failed.items() if rows}
    return RowSet.below(retry_rows.stop) - retry_rows, counts, retry_rows


def _run_metadata(run_file: RunFile) -> dict[str, str]:
    """Return what a run file adds to the parts' metadata."""
    return {"fingerprint": run_file.fingerprint, "options": msgspec.json.encode(run_file.options).decode()}
