"""The options of a run on the command line, made from the fields of options.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

import click

from ..options import GROUPS, OPTION_TYPES, all_fields, default, flag
from .refusal import EXIT_CODES


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
