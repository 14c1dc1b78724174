"""Commands about an output folder."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .refusal import refusing


@click.command(short_help="Merge all shards of an output folder into one file.")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@refusing
def merge(out: Path, file: Path | None) -> None:
    """Merge all shards of the output folder OUT into one FILE (.parquet or .jsonl), in the manifest's order.

    Exit code 3 if rows are missing.
    """
    from ..output import merge as merge_output

    report = merge_output(out, file)
    click.echo(str(report), err=True)
    sys.exit(3 if report.missing else 0)
