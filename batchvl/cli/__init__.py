"""The command line: parses, makes one call into the library, turns an error into an exit code. No logic."""

from __future__ import annotations

import click

from .._version import __version__
from .errors import EXIT_CODES
from .machine import demo, doctor
from .manifest import validate
from .output import merge, status
from .run import bench, retry, run

__all__ = ["EXIT_CODES", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchvl")
def main() -> None:
    """Offline batch inference of vision-language models.

    batchvl run manifest.parquet answers every row of a manifest: a prompt and pictures, from Parquet, JSONL, CSV or a
    folder of pictures. The same command goes on where it stopped.
    """


for command in (validate, run, retry, bench, status, merge, demo, doctor):
    main.add_command(command)
