"""The output of one shard, as the runner sees it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..config.options import OutputOptions
from ..config.units import Shard
from ..errors import BatchvlError, OptionError
from ..storage.disk import FAILING, Disk, as_stopped_early
from ..storage.object_store import RemoteError
from .attempt import Attempt
from .record import Counts, Record
from .remote import Remote
from .retry_selection import RetrySelection
from .rowset import Outcomes, RowSet
from .run_file import RUN_FILE, RunFile
from .shard import ShardFolder
from .writer import OnCommit, Writer


class ResultStore:
    """Records in, files out. Opened before the engine is there, since what is done decides whether one is needed.

    >>> import asyncio, tempfile
    >>> async def example(folder: Path) -> int:
    ...     output = ResultStore.open(folder, RunFile("f1", {}, total=2))
    ...     output.describe({"engine": "fake"})
    ...     output.add(Record(0, "ok", response="a cat"))
    ...     await output.room()
    ...     await output.close()
    ...     return len(ResultStore.open(folder, RunFile("f1", {})).done)
    >>> asyncio.run(example(Path(tempfile.mkdtemp())))
    1
    """

    done: RowSet
    """The rows that earlier attempts recorded, ok and failed; it does not grow with this attempt's."""
    counts: Counts
    """The same rows, counted."""
    redo: RowSet | None
    """Where this is a retry, the rows that it asks: they are neither in `done` nor counted, and all before them is."""

    def __init__(
        self, guard: RunFile, attempt: Attempt, writer: Writer, done: RowSet, counts: Counts, redo: RowSet | None
    ) -> None:
        self._guard, self._attempt, self._writer = guard, attempt, writer
        self.done, self.counts, self.redo = done, counts, redo

    @classmethod
    def open(
        cls, folder: Path | Remote, guard: RunFile, shard: Shard | None = None, *, options: OutputOptions | None = None,
        on_commit: OnCommit | None = None, redo: RetrySelection | None = None, disk: Disk | None = None,
    ) -> ResultStore:  # fmt: skip
        """Takes the shard's lock, compares `run.json`, takes an attempt's number and finds out what is done.

        on_commit is called on the event loop's thread with the counts of what has just become durable. With `redo` it
        is a retry of failed rows, whose results win over the earlier ones. Blocks; needs no event loop.

        Raises ResumeError (another run's folder, a runner at work in it, files damaged or too new), OptionError (a kept
        column's name, a folder that cannot be made or written) and StoppedEarly (the disk is full or failing).
        """
        shard, options, disk = shard or Shard(0, guard.shards), options or OutputOptions(), disk or Disk()
        schema = guard.schema
        try:
            if isinstance(folder, Remote):
                folder.claim(guard, disk)
            else:
                guard.claim(folder, disk)
            place = ShardFolder.of(folder, shard)
            if redo is None:
                attempt = Attempt(place, retry=0, total=guard.total, disk=disk)
            else:
                attempt = Attempt(place, retry=redo.number(place), total=None, disk=disk, codes=redo.told)
        except OSError as error:
            was_written = isinstance(folder, Path) and (folder / RUN_FILE).exists()
            if error.errno in FAILING or (error.errno == errno.EROFS and was_written):
                raise as_stopped_early(folder, error) from error
            raise OptionError(f"-o {folder}: cannot be written: {error.strerror}") from error
        try:
            attempt.folder.rescue(schema, _about(guard), disk)
            recovered = attempt.folder.recover()
            tally = recovered.tally()
        except OSError as error:
            attempt.release()
            raise as_stopped_early(attempt.folder.path, error) from error
        except BaseException:
            attempt.release()
            raise
        writer = Writer(
            attempt, schema, commit_seconds=options.commit_seconds, part_rows=options.part_rows, disk=disk,
            part_seconds=options.upload_seconds if isinstance(folder, Remote) else None, on_commit=on_commit,
        )  # fmt: skip
        done, counts, again = tally.rows(), tally.counts(), None
        if redo is not None:
            left = redo.left(tally, recovered.of_retry(attempt.retry))
            again = Outcomes(failed=left).rows()
            kept = {code: rows - len(left.get(code, ())) for code, rows in counts.failed.items()}
            counts.failed = {code: rows for code, rows in kept.items() if rows}
            done = RowSet.below(again.stop) - again
        return cls(guard, attempt, writer, done, counts, again)

    @property
    def complete(self) -> bool:
        """Whether earlier attempts did all of the shard's rows, as far as `total` is known."""
        total = self.total
        if total is None:
            return False
        rows = self._attempt.folder.shard.rows(total)
        return self.done.count(rows) == len(rows)

    @property
    def total(self) -> int | None:
        """The manifest's rows: the guard's, or those that an earlier attempt counted to the end."""
        if self._guard.total is None and (ended := self._attempt.folder.complete()) is not None:
            return ended.total
        return self._guard.total

    @property
    def folder(self) -> Path:
        """The shard's folder."""
        return self._attempt.folder.path

    @property
    def attempt(self) -> int:
        """The attempt's number, from 1."""
        return self._attempt.number

    def describe(self, metadata: Mapping[str, str]) -> None:
        """What the run says about itself: version, engine, …, as texts. Until this is called no part is made.

        Fingerprint and options are added. Raises StoppedEarly.
        """
        try:
            self._attempt.describe(metadata)
        except OSError as error:
            raise as_stopped_early(self.folder, error) from error
        self._writer.describe({**metadata, **_about(self._guard)})

    def beat(self, total: int | None) -> None:
        """A sign of life for who watches from elsewhere, also while there is nothing to write. In any thread.

        total: the manifest's rows, as well as they are known.
        """
        try:
            self._attempt.beat(total)
        except (OSError, BatchvlError):
            pass  # the next commit, or part, tells of what fails

    def add(self, record: Record) -> None:
        """Hands over a row's result: a few microseconds, never waits. `on_commit` tells when it is durable.

        Call it on the event loop's thread, after `await room()`. Raises StoppedEarly once writing has failed.
        """
        self._writer.add(record)

    async def room(self) -> None:
        """Returns once at most 32 MB wait to be written. Raises StoppedEarly once writing has failed."""
        await self._writer.room()

    async def close(self, complete: bool = False, total: int | None = None) -> None:
        """Commits what is left, makes the last part and lets go of the lock, whatever happens.

        complete: the shard's end was reached; total: the manifest's rows, where they were not known before.
        Raises StoppedEarly where not all could be written, and ResumeError where the place has become another run's
        meanwhile: what `on_commit` told of is kept.
        """
        try:
            await self._writer.close()
            if complete:
                if self.redo is not None:
                    self._attempt.end()
                else:
                    self._attempt.complete(self._guard.total if total is None else total)
            elif total is not None and self.redo is None:
                self._attempt.count(total)
            await asyncio.to_thread(self._attempt.finish)
        except OSError as error:
            raise as_stopped_early(self.folder, error) from error
        finally:
            self._attempt.release()

    def withdraw(self, *, logs: bool) -> None:
        """After `close`: takes back what this attempt left where no row was ever recorded, so that a run that could
        not start binds no later one to its settings. With `logs`, files that may tell why stay.
        """
        shard = self._attempt.folder
        try:
            if any(True for _ in shard.sources()):
                return
            shard.forget(self.attempt)
        except RemoteError:
            return  # it binds the later ones, then
        out, name = shard.path.parent, f"{self.attempt:04d}"
        if not logs:
            replicas = shard.path.glob(f"engine-{name}-*.log")
            for path in (shard.path / f"attempt-{name}.json", *shard.path.glob(f"*-{name}.log"), *replicas):
                path.unlink(missing_ok=True)
            if {path.name for path in shard.path.iterdir()} <= {"lock"}:
                (shard.path / "lock").unlink(missing_ok=True)
                shard.path.rmdir()
        if all(found.path == shard.path for found in ShardFolder.all(out)):
            (out / RUN_FILE).unlink(missing_ok=True)


def _about(guard: RunFile) -> dict[str, str]:
    """What a guard adds to the parts' metadata."""
    return {"fingerprint": guard.fingerprint, "options": msgspec.json.encode(guard.options).decode()}
