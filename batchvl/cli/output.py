"""Commands about the output of a run: `merge` and `status`."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import handle_errors
from .options import Command, argument

if TYPE_CHECKING:
    from ..results.status import Status

WATCH_SECONDS = 5.0
"""Interval of `status --watch` without a number."""
OUT_HELP = "The run's output directory, or s3://BUCKET/PREFIX."


class _OutputDirectory(click.Path):
    """An existing directory, or an address on an object store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in value else super().convert(value, param, ctx)


class _MergeCommand(Command):
    exit_codes = {  # noqa: RUF012
        0: "merged; no row is missing",
        1: "any other error",
        2: "invalid usage: nothing was merged",
        3: "rows are missing; merged only if --partial is given",
    }


@click.command(cls=_MergeCommand, short_help="Merge the results of all shards into one file.")
@argument("out", type=_OutputDirectory(exists=True, file_okay=False), description=OUT_HELP)
@argument(
    "file",
    required=False,
    type=click.Path(dir_okay=False, path_type=Path),
    description="A .parquet, .jsonl, .jsonl.gz or .jsonl.zst file. [default: OUT/results.parquet]",
)
@click.option("--partial", is_flag=True, help="Merge even if rows are missing.")
@click.option(
    "--with-manifest",
    metavar="MANIFEST",
    help="Add the columns of the run's manifest; one whose name is taken is added as manifest_NAME.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object to standard output.")
@handle_errors
def merge(out: str, file: Path | None, partial: bool, with_manifest: str | None, as_json: bool) -> None:
    """Merge the results of all shards in OUT into one FILE: each row once, in the manifest's order."""
    from .. import results

    report = results.merge(out, file, partial=partial, with_manifest=with_manifest)
    click.echo(report.as_json() if as_json else str(report), err=not as_json)
    sys.exit(0 if report.complete else 3)


class _StatusCommand(Command):
    """A command whose option `--watch` may be given without a number: click would take the next word, OUT, for it."""

    exit_codes = {0: "shown, whatever the state of the run", 1: "any other error", 2: "OUT is no output directory"}  # noqa: RUF012

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for index, (word, next_word) in enumerate(pairwise(args)):
            if word == "--watch" and not next_word.replace(".", "", 1).isdecimal():
                args = [*args[:index], f"--watch={WATCH_SECONDS:g}", *args[index + 1 :]]
        return super().parse_args(ctx, args)


@click.command(cls=_StatusCommand, short_help="Show the progress of a run.")
@argument("out", type=_OutputDirectory(exists=True, file_okay=False), description=OUT_HELP)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object; with --watch, one per line.")
@click.option(
    "--watch",
    "seconds",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=WATCH_SECONDS,
    type=click.FloatRange(min=0.1),
    help=f"Repeat until all shards are complete, every SECONDS ({WATCH_SECONDS:g} if not given). Stop with Ctrl-C.",
)
@click.option("--all", "every", is_flag=True, help="List every shard, however many there are.")
@handle_errors
def status(out: str, as_json: bool, seconds: float | None, every: bool) -> None:
    """Show the progress of the run in OUT, in total and by shard: rows done, failures by error code, rate, time left.

    Only reads files, and never disturbs a runner. The state of a shard is one of:

    \b
      complete   all rows are done
      running    a runner is at work
      stale      the runner was killed, or has been silent for 3 minutes
      stopped    the runner stopped, but not all rows are done
      waiting    not started

    The command of the run, run again, resumes stale and stopped shards.

    The JSON object has these fields: output, manifest, time, complete, expected (rows of the manifest, or null if
    unknown), estimated (whether expected is an estimate), rows (done), ok, failed, failures (rows by error code),
    rows_per_second, eta_seconds, last_sign (time of the last sign of life), last_sign_seconds (seconds since then),
    states (shards by state), stale (indices of stale shards) and shards. Each shard has the same fields, and shard (its
    index), state, attempt, retry, host, pid, since, last_row_seconds and message.
    """
    from .. import results

    if seconds is None:
        _show(results.status(out), out, as_json, every)
        return
    try:
        for snapshot in results.watch(out, seconds):
            _show(snapshot, out, as_json, every, watching=True)
    except KeyboardInterrupt:
        pass  # the normal way to end it


def _show(status: Status, out: str, as_json: bool, every: bool, *, watching: bool = False) -> None:
    if as_json:
        click.echo(status.as_json(indent=0 if watching else 2))
    elif not watching:
        click.echo(status.text(all=every))
    elif sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        click.echo("\033[H\033[J" + status.text(all=every, height=height - 1, width=width))
    else:
        click.echo(f"{status.time} {out}\n{status.text(all=every)}\n")
