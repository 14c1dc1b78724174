"""Commands that run a model: `run`, `retry` and `bench`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from ..config.options import RETRY_OPTIONS
from .errors import EXIT_CODES, handle_errors
from .options import Command, argument, options_of, run_options


@click.command(cls=Command, short_help="Run a model on every row of a manifest.")
@run_options
@click.option("--quiet", "-q", is_flag=True, help="Print neither progress nor summary.")
@handle_errors
def run(manifest: str | None, config: str | None, quiet: bool, **options: Any) -> None:
    """Run a model on every row of MANIFEST.

    MANIFEST is a file, directory or glob of Parquet, JSONL (also .gz, .zst), CSV or tars (WebDataset), what img2dataset
    wrote, or a directory of images.

    If the run is interrupted, run the same command again: it resumes where it stopped.

    Every option can also be set by an environment variable (BATCHVL_MAX_TILES for --max-tiles) or in a job file
    (max_tiles = 6). Flags have precedence over variables, variables over the file. Switches have a negative form:
    --no-number-images.
    """
    from ..runner import job

    summary = job.run(manifest, quiet=quiet, config=config, **options)
    if not quiet:
        with suppress(OSError):  # the terminal may be closed; the exit code still reports the result
            click.echo(str(summary), err=True)
    sys.exit(summary.exit_code)


@click.command(cls=Command, short_help="Retry rows that failed in a run.")
@argument("out", type=click.Path(), description="The run's output directory, or s3://BUCKET/PREFIX.")
@options_of(RETRY_OPTIONS - {"shard"})
@click.option("--shard", metavar="I/N", help="Retry only this shard of the run. [default: all]")
@click.option("--codes", metavar="A,B", help="Retry rows that failed with one of these error codes.")
@click.option("--all", "every", is_flag=True, help="Retry all failed rows.")
@click.option("--manifest", metavar="MANIFEST", help="New location of the manifest. [default: as in the run]")
@click.option("--quiet", "-q", is_flag=True, help="Print neither progress nor summary.")
@handle_errors
def retry(
    out: str, codes: str | None, every: bool, manifest: str | None, config: str | None, quiet: bool, **options: Any
) -> None:
    """Retry failed rows of the run in OUT.

    By default, only rows with a retryable error are retried, such as a timeout (see docs/reference.md); --codes and
    --all select others.

    Options that change what an answer means stay as they were in the run; all others can be set. Earlier results are
    kept: in merged results, an answer replaces a failure, and a later failure replaces an earlier one.
    """
    from ..runner import retry

    selected = [code.strip() for code in (codes or "").split(",") if code.strip()]
    summaries = retry.retry(out, codes=selected, all=every, manifest=manifest, config=config, quiet=quiet, **options)
    if not quiet:
        with suppress(OSError):
            click.echo("\n\n".join(map(str, summaries)) or f"{out}: no failed row to retry", err=True)
    sys.exit(next((summary.exit_code for summary in reversed(summaries) if summary.exit_code), 0))


class _BenchCommand(Command):
    exit_codes = {0: "measured", 1: "the measurement failed", 2: EXIT_CODES[2]}  # noqa: RUF012


@click.command(cls=_BenchCommand, short_help="Compare throughput with the engine's own ceiling.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object to standard output.")
@handle_errors
def bench(manifest: str | None, config: str | None, as_json: bool, **options: Any) -> None:
    """Measure the throughput on this machine, and what limits it.

    Processes the first rows of MANIFEST as batchvl run does, then once more with all images prepared beforehand, which
    gives the engine's own ceiling. Results are discarded.

    Accepts the options of batchvl run. --limit sets the number of rows. [default: 1000]
    """
    from ..runner import bench

    report = bench.bench(manifest, config=config, **options)
    click.echo(report.as_json() if as_json else str(report))
