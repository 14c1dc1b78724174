"""Commands whose help has sections, and the options of a run as command-line options."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Literal, get_args, get_origin

import click

from ..config.options import (
    NAMES,
    OPTION_TYPES,
    EngineOptions,
    FetchOptions,
    ImageOptions,
    LmdeployOptions,
    ManifestOptions,
    ModelOptions,
    OutputOptions,
    PromptOptions,
    SamplingOptions,
    all_fields,
    default,
    flag,
)
from .errors import EXIT_CODES

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

HELP_ORDER = (
    ManifestOptions,
    PromptOptions,
    ModelOptions,
    SamplingOptions,
    OutputOptions,
    EngineOptions,
    LmdeployOptions,
    FetchOptions,
    ImageOptions,
)
"""The groups of options in the order in which help shows them: what most users need comes first."""


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the argument MANIFEST, all options of a run and `--config` to a command."""
    return argument("manifest", required=False, description="File, directory or glob. [default: the job file's]")(
        options_of(NAMES)(command)
    )


def options_of(names: Container[str]) -> Decorator:
    """Return a decorator that adds some of a run's options, and `--config`, to a command."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        config = "Job file (TOML) with options. [default: batchvl.toml next to MANIFEST, if it exists]"
        command = click.option("--config", metavar="FILE", help=config)(command)
        for field in reversed([field for field in all_fields() if field.name in names]):
            command = _option(field)(command)
        return command

    return decorate


def argument(name: str, *, description: str, **settings: Any) -> Decorator:
    """Return a decorator that adds a positional argument with a description."""
    return click.argument(name, cls=_Argument, description=description, **settings)


class Command(click.Command):
    """A command whose help has sections for its arguments, for each group of options and for its exit codes."""

    groups: ClassVar[Sequence[type[Any]]] = HELP_ORDER
    """The groups that the help shows."""
    exit_codes: ClassVar[Mapping[int, str]] = EXIT_CODES

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Do nothing: `format_options` writes the arguments, too, since click below 8.5 does not call this."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections behind the command's description."""
        params = self.get_params(ctx)
        if arguments := [p.get_help_record(ctx) for p in params if isinstance(p, _Argument)]:
            with formatter.section("Arguments"):
                formatter.write_dl(arguments)
        records = {str(p.name): r for p in params if isinstance(p, click.Option) and (r := _help_record(p, ctx))}
        for group in HELP_ORDER:
            rows = [records.pop(name) for name in group.__dataclass_fields__ if name in records]
            if rows and group in self.groups:
                with formatter.section(group.title):
                    formatter.write_dl(rows)
        with formatter.section("General options" if self.groups_of(params) else "Options"):
            formatter.write_dl(list(records.values()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in self.exit_codes.items()])

    def groups_of(self, params: Sequence[click.Parameter]) -> list[type[Any]]:
        """Return the groups of which the command has options."""
        names = {param.name for param in params}
        return [group for group in self.groups if names & group.__dataclass_fields__.keys()]


class _Argument(click.Argument):
    def __init__(self, param_decls: Sequence[str], description: str, **attrs: Any) -> None:
        super().__init__(param_decls, **attrs)
        self.description = description

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        return self.make_metavar(ctx), self.description


def _option(field: Field[Any]) -> Decorator:
    hint, name = OPTION_TYPES[field.name], flag(field.name)
    settings: dict[str, Any] = {"help": _help(field), "default": None, "metavar": field.metadata["metavar"]}
    if hint is bool:
        return click.option(f"{name}/--no-{name[2:]}", field.name, **{**settings, "metavar": None})
    if get_origin(hint) is tuple:
        settings["multiple"] = True
    elif get_origin(hint) is Literal:
        settings |= {"type": click.Choice(get_args(hint)), "metavar": None}
    return click.option(name, *(["-o"] if field.name == "output" else []), field.name, **settings)


def _help(field: Field[Any]) -> str:
    text, value = str(field.metadata["help"]), default(field)
    if "[default:" in text or value is None or value is False or value == ():
        return text
    return f"{text} [default: {value}]"


def _help_record(option: click.Option, ctx: click.Context) -> tuple[str, str] | None:
    """Return an option and its help. Of a switch, only the positive form is shown, as in the help of other tools."""
    record = option.get_help_record(ctx)
    if record is None or not option.secondary_opts:
        return record
    return option.opts[0], record[1]
