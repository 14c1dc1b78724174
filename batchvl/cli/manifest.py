"""Commands about a manifest."""

from __future__ import annotations

import sys
from typing import Any

import click

from ..config.options import FetchOptions, ImageOptions, ManifestOptions, PromptOptions, SamplingOptions
from .errors import handle_errors
from .options import GroupedCommand, run_options


class _LookingCommand(GroupedCommand):
    """Takes every option of a run, and shows those that say how a manifest is read."""

    groups = (ManifestOptions, PromptOptions, FetchOptions, ImageOptions, SamplingOptions)
    exit_codes = {  # noqa: RUF012
        0: "no error was found",
        3: "errors were found: rows that would fail, ids that are there twice",
        2: "usage or configuration: nothing was looked at",
        1: "anything else",
    }


@click.command(cls=_LookingCommand, short_help="Check a whole manifest without a model.")
@run_options
@click.option(
    "--probe", metavar="N", type=click.IntRange(min=0), default=0, help="Fetch and decode the pictures of N rows, too."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@handle_errors
def validate(manifest: str | None, config: str | None, probe: int, as_json: bool, **options: Any) -> None:
    """Look at every row of MANIFEST as batchvl run would read it, without a model: columns, ids, prompts, settings,
    where pictures are and how often the same ones come again. Files are looked for; nothing is opened or fetched.

    All options of batchvl run are taken, so that a run's command line can stay as it is; these are the ones that count.
    """
    from ..validation import validate as look

    report = look(manifest, probe=probe, config=config, **options)
    click.echo(report.as_json() if as_json else str(report))
    sys.exit(report.exit_code)
