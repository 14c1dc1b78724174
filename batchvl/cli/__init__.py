"""The command line: it parses arguments, calls the library once, and turns errors into exit codes."""

from __future__ import annotations

import click

from .._version import __version__
from .errors import EXIT_CODES
from .fetch import fetch
from .machine import demo, doctor
from .manifest import validate
from .output import merge, status
from .run import bench, retry, run

__all__ = ["EXIT_CODES", "main"]


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which they were added, not sorted by name


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchvl")
def main() -> None:
    """Offline batch inference of vision-language models.

    Run a model on every row of a manifest: a prompt with images, from Parquet, JSONL, CSV, tars or a directory of
    images. An interrupted run resumes when the same command is run again.

    \b
      batchvl demo                     try it out with a tiny built-in model
      batchvl doctor                   check this machine
      batchvl run manifest.parquet     process a manifest
    """


for command in (run, fetch, retry, status, merge, validate, bench, doctor, demo):
    main.add_command(command)
