"""Commands that answer a manifest's rows."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from ..config.options import RETRY_OPTIONS
from .errors import EXIT_CODES, handle_errors
from .options import GroupedCommand, options_of, run_options


@click.command(cls=GroupedCommand, short_help="Answer the rows of a manifest.")
@run_options
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
@handle_errors
def run(manifest: str | None, config: str | None, quiet: bool, **options: Any) -> None:
    """Answer the rows of MANIFEST, a file, a folder or a glob of Parquet, JSONL (.gz, .zst) or CSV, or a folder of
    pictures.

    Each option can also come from the environment (BATCHVL_MAX_TILES for --max-tiles) or a job file (max_tiles = 6);
    flags win, then the environment, then the file.
    """
    from ..runner.job import run as answer

    summary = answer(manifest, quiet=quiet, config=config, **options)
    if not quiet:
        with suppress(OSError):  # the terminal may be gone: the exit code still tells
            click.echo(str(summary), err=True)
    sys.exit(summary.exit_code)


@click.command(cls=GroupedCommand, short_help="Ask failed rows of an output folder again.")
@click.argument("out", type=click.Path())
@options_of(RETRY_OPTIONS - {"shard"})
@click.option("--shard", metavar="I/N", help="Only this one of the run's shards. [default: all]")
@click.option("--codes", metavar="A,B", help="Rows that failed with one of these error codes.")
@click.option("--all", "every", is_flag=True, help="All rows that failed.")
@click.option("--manifest", metavar="MANIFEST", help="Where the manifest is now. [default: where it was]")
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
@handle_errors
def retry(
    out: str, codes: str | None, every: bool, manifest: str | None, config: str | None, quiet: bool, **options: Any
) -> None:
    """Ask again the rows of the output folder OUT that failed for reasons that may pass (docs/reference.md has which),
    or those of --codes, or --all.

    The options are those of batchvl run that do not change what an answer means; these stay as the run had them. What
    the rows came to before is kept in OUT; in the results an answer wins over a failure, and the later failure over the
    earlier.
    """
    from ..runner.retry import retry as again

    wanted = [code.strip() for code in (codes or "").split(",") if code.strip()]
    summaries = again(out, codes=wanted, all=every, manifest=manifest, config=config, quiet=quiet, **options)
    if not quiet:
        with suppress(OSError):
            click.echo("\n\n".join(map(str, summaries)) or f"{out}: no row has failed like that", err=True)
    sys.exit(next((s.exit_code for s in reversed(summaries) if s.exit_code), 0))


class _MeasuringCommand(GroupedCommand):
    exit_codes = {0: "measured", 2: EXIT_CODES[2], 1: "nothing was measured, or anything else"}  # noqa: RUF012


@click.command(cls=_MeasuringCommand, short_help="How fast this machine answers, beside how fast its engine could.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@handle_errors
def bench(manifest: str | None, config: str | None, as_json: bool, **options: Any) -> None:
    """Answer some rows of MANIFEST as batchvl run does, then again with everything prepared beforehand, and tell what
    limits the run. Nothing is kept.

    The options are those of batchvl run; --limit says how many rows. [default: 1000]
    """
    from ..runner.bench import bench as measure

    found = measure(manifest, config=config, **options)
    click.echo(found.as_json() if as_json else str(found))
