"""Commands about the machine at hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .errors import handle_errors


@click.command(short_help="See it work: drawn pictures, a tiny model, every answer checked.")
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@handle_errors
def demo(folder: Path | None) -> None:
    """Answer questions about drawn pictures with the tiny model that batchvl carries, and check every answer.

    Pictures, manifest and answers go into FOLDER. [default: a new folder batchvl-demo]
    """
    from ..demo import demo as answer

    sys.exit(answer(folder))


@click.command(short_help="What works on this machine, and what to do about what does not.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the screen.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    help="For importing torch and the engines' libraries, which takes long from a cold network disk.",
)
@handle_errors
def doctor(as_json: bool, timeout: float) -> None:
    """Look at Python, GPUs, libraries, memory, disk and Slurm, and say what works and what to do about what does not.

    The last line says which engine batchvl run takes here. Exit code 0 if an engine can run, 2 if none can.
    """
    from .. import doctor as checks

    findings = []
    for finding in checks.examine(timeout, _passing):
        findings.append(finding)
        if not as_json:
            click.echo(str(finding))
    if as_json:
        click.echo(json.dumps(checks.as_json(findings), indent=2))
    sys.exit(2 if findings[-1].level == "missing" else 0)


def _passing(text: str) -> None:
    """A line on a terminal that the next one takes the place of."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", err=True, nl=False)
