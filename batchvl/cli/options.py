"""The options of a run on the command line, made from the fields of options.py."""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import Field
from typing import Any, Literal, get_args, get_origin

import click

from ..config.options import GROUPS, NAMES, OPTION_TYPES, all_fields, default, flag
from .errors import EXIT_CODES


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A run's manifest, every option of it, and its job file."""
    return click.argument("manifest", required=False)(options_of(NAMES)(command))


def options_of(names: Container[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Some of a run's options, made from the fields of options.py, and the job file."""
    return functools.partial(_options, [found for found in all_fields() if found.name in names])


def _options(fields: Sequence[Field[Any]], command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option("--config", metavar="FILE", help="TOML job file. [default: batchvl.toml beside MANIFEST]")(
        command
    )
    for found in reversed(fields):
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
    return command


def _help(found: Any) -> str:
    text, value = found.metadata["help"], default(found)
    if "[default:" in text or value in (None, "", ()) or value is False:
        return str(text)
    return f"{text} [default: {value}]"


class GroupedCommand(click.Command):
    """A command whose help shows its options by concern."""

    groups: Sequence[type] = GROUPS
    """The concerns that are shown."""
    exit_codes: Mapping[int, str] = EXIT_CODES

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        records = {str(p.name): r for p in self.get_params(ctx) if (r := p.get_help_record(ctx)) is not None}
        for group in GROUPS:
            rows = [records.pop(name) for name in group.__dataclass_fields__ if name in records]
            if rows and group in self.groups:
                with formatter.section(group.__doc__ or ""):
                    formatter.write_dl(rows)
        with formatter.section("The command itself"):
            formatter.write_dl(list(records.values()))
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), text) for code, text in self.exit_codes.items()])
