"""The command line: parses, makes one call into the library, turns an error into an exit code. No logic."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from . import __version__
from .errors import BatchvlError, StoppedEarly
from .options import GROUPS, OPTION_TYPES, all_fields, default, flag

EXIT_CODES = {
    0: "complete; failed rows are within --accept-failures",
    3: "complete, but more rows failed than that",
    4: "stopped by --max-failures",
    75: "stopped early (signal, time, disk): run the same command again to go on",
    2: "usage or configuration: nothing was run",
    1: "anything else",
}


class Refusal(click.ClickException):
    """A library error on its way to the shell."""

    def __init__(self, error: BatchvlError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]


def refusing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turns the library's errors into messages and exit codes."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BatchvlError as error:
            raise Refusal(error) from None
        except KeyboardInterrupt:
            raise Refusal(StoppedEarly("stopped by SIGINT before anything was run")) from None

    return wrapped


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A run's manifest, every option of it, made from the fields of options.py, and its job file."""
    command = click.option("--config", metavar="FILE", help="TOML job file. [default: batchvl.toml beside MANIFEST]")(
        command
    )
    for found in reversed(list(all_fields())):
        hint = OPTION_TYPES[found.name]
        settings: dict[str, Any] = {"help": _help(found), "default": None, "metavar": found.metadata["metavar"]}
        if hint is bool:
            name = flag(found.name)
            command = click.option(f"{name}/--no-{name[2:]}", found.name, **{**settings, "metavar": None})(command)
            continue
        if get_origin(hint) is tuple:
            settings["multiple"] = True
        elif get_origin(hint) is Literal:
            settings |= {"type": click.Choice(get_args(hint)), "metavar": None}
        names = [flag(found.name), *(["-o"] if found.name == "output" else [])]
        command = click.option(*names, found.name, **settings)(command)
    return click.argument("manifest", required=False)(command)


def _help(found: Any) -> str:
    text, value = found.metadata["help"], default(found)
    if "[default:" in text or value in (None, "", ()) or value is False:
        return str(text)
    return f"{text} [default: {value}]"


class GroupedCommand(click.Command):
    """A command whose help shows its options by concern."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {str(p.name): r for p in self.get_params(ctx) if (r := p.get_help_record(ctx)) is not None}
        for group in GROUPS:
            rows = [records.pop(name) for name in group.__dataclass_fields__]
            with formatter.section(group.__doc__ or ""):
                formatter.write_dl(rows)
        with formatter.section("The command itself"):
            formatter.write_dl(list(records.values()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in EXIT_CODES.items()])


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchvl")
def main() -> None:
    """Offline batch inference of vision-language models.

    batchvl run manifest.parquet answers every row of a manifest: a prompt and pictures, from Parquet, JSONL, CSV or a
    folder of pictures. The same command goes on where it stopped.
    """


@main.command(cls=GroupedCommand, short_help="Answer the rows of a manifest.")
@run_options
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary.")
@refusing
def run(manifest: str | None, config: str | None, quiet: bool, **options: Any) -> None:
    """Answer the rows of MANIFEST, a file, a folder or a glob of Parquet, JSONL (.gz, .zst) or CSV, or a folder of
    pictures.

    Each option can also come from the environment (BATCHVL_MAX_TILES for --max-tiles) or a job file (max_tiles = 6);
    flags win, then the environment, then the file.
    """
    from .job import run as answer

    summary = answer(manifest, quiet=quiet, config=config, **options)
    if not quiet:
        with suppress(OSError):  # the terminal may be gone: the exit code still tells
            click.echo(str(summary), err=True)
    sys.exit(summary.exit_code)


@main.command(cls=GroupedCommand, short_help="How fast this machine answers, beside how fast its engine could.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
@refusing
def bench(manifest: str | None, config: str | None, as_json: bool, **options: Any) -> None:
    """Answer some rows of MANIFEST as batchvl run does, then again with everything prepared beforehand, and tell what
    limits the run. Nothing is kept.

    The options are those of batchvl run; --limit says how many rows. [default: 1000]
    """
    from .bench import bench as measure

    found = measure(manifest, config=config, **options)
    click.echo(found.as_json() if as_json else str(found))


@main.command(short_help="Merge all shards of an output folder into one file.")
@click.argument("out", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("file", required=False, type=click.Path(dir_okay=False, path_type=Path))
@refusing
def merge(out: Path, file: Path | None) -> None:
    """Merge all shards of the output folder OUT into one FILE (.parquet or .jsonl), in the manifest's order.

    Exit code 3 if rows are missing.
    """
    from .output import merge as merge_output

    report = merge_output(out, file)
    click.echo(str(report), err=True)
    sys.exit(3 if report.missing else 0)


@main.command(short_help="See it work: drawn pictures, a tiny model, every answer checked.")
@click.argument("folder", required=False, type=click.Path(file_okay=False, path_type=Path))
@refusing
def demo(folder: Path | None) -> None:
    """Answer questions about drawn pictures with the tiny model that batchvl carries, and check every answer.

    Pictures, manifest and answers go into FOLDER. [default: a new folder batchvl-demo]
    """
    from .demo import demo as answer

    sys.exit(answer(folder))


@main.command(short_help="What works on this machine, and what to do about what does not.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the screen.")
@click.option(
    "--timeout",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    default=120,
    show_default=True,
    help="For importing torch and the engines' libraries, which takes long from a cold network disk.",
)
@refusing
def doctor(as_json: bool, timeout: float) -> None:
    """Look at Python, GPUs, libraries, memory, disk and Slurm, and say what works and what to do about what does not.

    The last line says which engine batchvl run takes here. Exit code 0 if an engine can run, 2 if none can.
    """
    from . import doctor as checks

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
