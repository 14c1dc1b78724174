"""The command about a manifest: `validate`."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..config.options import FetchOptions, ImageOptions, ManifestOptions, PromptOptions, SamplingOptions
from .errors import handle_errors
from .options import Command, run_options


class _ValidateCommand(Command):
    """A command that accepts all options of a run, and shows those that affect how a manifest is read."""

    groups = (ManifestOptions, PromptOptions, FetchOptions, ImageOptions, SamplingOptions)
    exit_codes = {  # noqa: RUF012
        0: "no errors found",
        1: "any other error",
        2: "invalid usage or manifest: nothing was checked",
        3: "errors found: rows that would fail, or duplicate IDs",
    }


@click.command(cls=_ValidateCommand, short_help="Check a manifest without running a model.")
@run_options
@click.option(
    "--probe", metavar="N", type=click.IntRange(min=0), default=0, help="Also fetch and decode the images of N rows."
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object to standard output.")
@handle_errors
def validate(manifest: str | None, config: str | None, probe: int, as_json: bool, **options: Any) -> None:
    """Check every row of MANIFEST as batchvl run would read it, without running a model.

    Checks columns, IDs, prompts, sampling options and image sources, and counts repeated images. Image files must
    exist, but no image is opened or fetched, unless --probe is given.

    Accepts all options of batchvl run, so that its command line can be reused; shown are those that have an effect.
    """
    from .. import validation

    report = validation.validate(manifest, probe=probe, config=config, **options)
    click.echo(report.as_json() if as_json else str(report))
    sys.exit(report.exit_code)
