"""Commands that answer a manifest's rows."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from .options import GroupedCommand, run_options
from .refusal import refusing


@click.command(cls=GroupedCommand, short_help="Answer the rows of a manifest.")
@run_options
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
@refusing
def run(manifest: str | None, config: str | None, quiet: bool, **options: Any) -> None:
    """Answer the rows of MANIFEST, a file, a folder or a glob of Parquet, JSONL (.gz, .zst) or CSV, or a folder of
    pictures.

    Each option can also come from the environment (BATCHVL_MAX_TILES for --max-tiles) or a job file (max_tiles = 6);
    flags win, then the environment, then the file.
    """
    from ..job import run as answer

    summary = answer(manifest, quiet=quiet, config=config, **options)
    if not quiet:
        with suppress(OSError):  # the terminal may be gone: the exit code still tells
            click.echo(str(summary), err=True)
    sys.exit(summary.exit_code)


@click.command(cls=GroupedCommand, short_help="How fast this machine answers, beside how fast its engine could.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@refusing
def bench(manifest: str | None, config: str | None, as_json: bool, **options: Any) -> None:
    """Answer some rows of MANIFEST as batchvl run does, then again with everything prepared beforehand, and tell what
    limits the run. Nothing is kept.

    The options are those of batchvl run; --limit says how many rows. [default: 1000]
    """
    from ..bench import bench as measure

    found = measure(manifest, config=config, **options)
    click.echo(found.as_json() if as_json else str(found))
