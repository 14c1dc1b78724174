"""The command that fetches images without running a model: `fetch`."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click

from ..config.options import (
    FETCH_COMMAND_OPTIONS,
    FILE_FORMATS,
    FetchOptions,
    FileFormat,
    ImageOptions,
    ManifestOptions,
    OutputOptions,
)
from .errors import EXIT_CODES, handle_errors
from .options import Command, argument, options_of


class _FetchCommand(Command):
    groups = (ManifestOptions, OutputOptions, FetchOptions, ImageOptions)
    exit_codes = {**EXIT_CODES, 2: "invalid usage or manifest: nothing was fetched"}  # noqa: RUF012


@click.command(cls=_FetchCommand, short_help="Fetch the images of a manifest, for a run without a network.")
@argument("manifest", required=False, description="File, directory or glob. [default: the job file's]")
@options_of(FETCH_COMMAND_OPTIONS - {"output"})
@click.option("--output", "-o", metavar="DIR", help="Directory for the files of images.")
@click.option(
    "--format",
    type=click.Choice(FILE_FORMATS),
    default="parquet",
    help="Where the images are: in the Parquet files, or in tars that these point at. [default: parquet]",
)
@click.option("--file-bytes", metavar="SIZE", default="512MiB", help="Size of a file of images. [default: 512MiB]")
@click.option(
    "--no-decode", "decode", flag_value=False, default=True, help="Do not decode images to check them, which is faster."
)
@click.option("--retry", is_flag=True, help="Fetch only rows again that failed with a retryable error code.")
@click.option("--quiet", "-q", is_flag=True, help="Print neither progress nor summary.")
@handle_errors
def fetch(
    manifest: str | None,
    config: str | None,
    format: FileFormat,
    file_bytes: str,
    decode: bool,
    retry: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Fetch the images of MANIFEST into Parquet files in the directory of -o, which batchvl run reads as its manifest.

    Images are fetched and checked as batchvl run does. Files have the rows' columns as they are, their images as bytes
    or as paths in tars, and source_row, the row's number in MANIFEST; the order of rows is that in which their images
    arrived. Rows that fail are in no file: DIR/_fetch has a record of each row, with its file or its error code.

    If the fetch is interrupted, run the same command again: it resumes with the rows that are in no complete file.
    """
    from ..runner import fetch

    summary = fetch.fetch(
        manifest,
        format=format,
        file_bytes=file_bytes,
        decode=decode,
        retry=retry,
        config=config,
        quiet=quiet,
        **options,
    )
    if not quiet:
        with suppress(OSError):
            click.echo(str(summary), err=True)
    sys.exit(summary.exit_code)
