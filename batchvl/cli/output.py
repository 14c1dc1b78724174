"""Commands about an output folder."""

from __future__ import annotations

import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import handle_errors

if TYPE_CHECKING:
    from ..results.status import Status


class _OutputFolder(click.Path):
    """A folder that is there, or an address on an object store."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in value else super().convert(value, param, ctx)


@click.command(short_help="Merge all shards of an output folder into one file.")
@click.argument("out", type=_OutputFolder(exists=True, file_okay=False))
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@click.option("--partial", is_flag=True, help="Also where rows are missing: what there is.")
@click.option(
    "--with-manifest",
    metavar="MANIFEST",
    help="The run's manifest: its columns go beside the answers; one whose name is taken becomes manifest_NAME.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@handle_errors
def merge(out: str, file: Path | None, partial: bool, with_manifest: str | None, as_json: bool) -> None:
    """Merge all shards of the output folder OUT into one FILE, each row once, in the manifest's order.

    FILE ends in .parquet, .jsonl, .jsonl.gz or .jsonl.zst. [default: OUT/results.parquet]

    Exit code 0 if all rows are there, 3 if some are missing: then nothing is written unless --partial is given.
    """
    from ..results import merge as merge_output

    report = merge_output(out, file, partial=partial, with_manifest=with_manifest)
    click.echo(report.as_json() if as_json else str(report), err=not as_json)
    sys.exit(0 if report.complete else 3)


class _OptionalSeconds(click.Command):
    """A command whose `--watch` may stand before OUT without a number: click would take OUT for it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for at, (word, after) in enumerate(pairwise(args)):
            if word == "--watch" and not after.replace(".", "", 1).isdecimal():
                args = [*args[:at], f"--watch={_WATCH_SECONDS:g}", *args[at + 1 :]]
        return super().parse_args(ctx, args)


_WATCH_SECONDS = 5.0


@click.command(cls=_OptionalSeconds, short_help="How a run is getting on: rows done, failures, rate, time left.")
@click.argument("out", type=_OutputFolder(exists=True, file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON object; with --watch one a line.")
@click.option(
    "--watch",
    "seconds",
    metavar="[SECONDS]",
    is_flag=False,
    flag_value=_WATCH_SECONDS,
    type=click.FloatRange(min=0.1),
    help=f"Again every so many seconds until all shards are complete; {_WATCH_SECONDS:g} unless told. Ctrl-C ends it.",
)
@click.option("--all", "every", is_flag=True, help="Each shard, however many there are.")
@handle_errors
def status(out: str, as_json: bool, seconds: float | None, every: bool) -> None:
    """How the run of the output folder OUT is getting on, all shards together and each: rows done, rows failed by error
    code, rate, time left, the last sign of life.

    It only reads, and never stands in a runner's way. A shard is complete, running, stale (its runner was killed, or
    has shown no sign of life for three minutes), stopped (its runner ended in order before all rows were done) or
    waiting (not begun). Stale and stopped ones go on by the same command again.

    The JSON object has output, manifest, time, complete, expected (the manifest's rows, null where not known),
    estimated (whether that is a guess), rows (done), ok, failed, failures (rows by error code), rows_per_second,
    eta_seconds, last_sign (a time), last_sign_seconds (since then), states (shards by state), stale (shards' indices),
    and shards: for each the same, with shard (its index), state, attempt, retry, host, pid, since, last_row_seconds
    and message.

    Exit code 0 however the run is doing, 2 if OUT is no output folder.
    """
    from ..results import status as look
    from ..results import watch

    if seconds is None:
        _show(look(out), out, as_json, every)
        return
    try:
        for found in watch(out, seconds):
            _show(found, out, as_json, every, watched=True)
    except KeyboardInterrupt:
        pass  # which is how one stops watching


def _show(found: Status, out: str, as_json: bool, every: bool, *, watched: bool = False) -> None:
    if as_json:
        click.echo(found.as_json(indent=0 if watched else 2))
    elif not watched:
        click.echo(found.text(all=every))
    elif sys.stdout.isatty():
        width, height = shutil.get_terminal_size()
        click.echo("\033[H\033[J" + found.text(all=every, height=height - 1, width=width))
    else:
        click.echo(f"{found.time} {out}\n{found.text(all=every)}\n")
