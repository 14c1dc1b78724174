"""Commands about this machine: `doctor` and `demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .errors import EXIT_CODES, handle_errors
from .options import Command, argument


class _DemoCommand(Command):
    exit_codes = {  # noqa: RUF012
        0: "all answers are correct, and only the invalid rows failed",
        1: "an answer is wrong, or the run failed",
        2: EXIT_CODES[2],
    }


@click.command(cls=_DemoCommand, short_help="Run a tiny built-in model on generated images.")
@argument(
    "directory",
    metavar="[DIR]",
    required=False,
    type=click.Path(file_okay=False, path_type=Path),
    description="New directory for images, manifest and results. [default: batchvl-demo]",
)
@handle_errors
def demo(directory: Path | None) -> None:
    """Run a tiny built-in model on generated images, and check every answer.

    Needs torch and transformers, but no GPU and no download.
    """
    from .. import demo

    sys.exit(demo.demo(directory))


class _DoctorCommand(Command):
    exit_codes = {0: "an engine can run", 1: "any other error", 2: "no engine can run"}  # noqa: RUF012


@click.command(cls=_DoctorCommand, short_help="Check this machine and suggest fixes.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object to standard output.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=120,
    help="Time limit for importing the engines' libraries, which is slow on a network disk. [default: 120]",
)
@handle_errors
def doctor(as_json: bool, timeout: float) -> None:
    """Check Python, GPUs, libraries, memory, disk and Slurm, and suggest fixes.

    The last line names the engine that batchvl run uses on this machine.
    """
    from .. import doctor

    findings = []
    for finding in doctor.examine(timeout, _show_progress):
        findings.append(finding)
        if not as_json:
            click.echo(str(finding))
    if as_json:
        click.echo(json.dumps(doctor.as_json(findings), indent=2))
    sys.exit(2 if findings[-1].level == "missing" else 0)


def _show_progress(text: str) -> None:
    """Show a line on the terminal that the next output replaces."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", err=True, nl=False)
