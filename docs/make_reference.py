"""Writes docs/reference.md from the code: `python docs/make_reference.py`. A test keeps the two equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args, get_origin

from batchvl.cli import EXIT_CODES
from batchvl.config.options import GROUPS, OPTION_TYPES, default, env_variable, flag
from batchvl.errors import row_errors
from batchvl.results import COLUMNS

PAGE = Path(__file__).with_name("reference.md")
HEAD = """# Reference

Made from the code by `python docs/make_reference.py`.

## Options of `batchvl run`

Each can be given as a flag (`--max-tiles 6`), as a variable of the environment (`BATCHVL_MAX_TILES=6`), in a TOML job
file (`max_tiles = 6`; `--config FILE`, else `batchvl.toml` beside the manifest), or to `batchvl.run(..., max_tiles=6)`.
Flags win over variables, variables over the file. Sizes are bytes (`500000`, `32MB`, `4GiB`), times are seconds (`90`,
`15m`, `2h`). Options marked ● change what an answer means: a run that goes on in an output folder must be given the
same. `batchvl bench` and `batchvl validate` take the same options; `batchvl retry` those without the mark, but for
`--output` and `--limit`.
"""


def reference() -> str:
    """The page."""
    parts = [HEAD]
    for group in GROUPS:
        rows = []
        for name, field in group.__dataclass_fields__.items():
            text = field.metadata["help"].replace("|", "\\|")
            mark = " ●" if field.metadata["meaning"] else ""
            rows.append((f"`{flag(name)}`{mark}", _values(name, field), _default(field), text.split(" [default:")[0]))
        parts += [f"### {group.__doc__}\n", _table(("option", "value", "default", "what it does"), rows)]
    parts.append(
        f"The variable of an option is its name in capitals: `{flag('max_tiles')}` is `{env_variable('max_tiles')}`.\n"
    )
    parts += ["## Exit codes\n", _table(("code", "meaning"), [(str(c), t) for c, t in EXIT_CODES.items()])]
    columns = [(f"`{name}`", f"`{column.type}`", column.help) for name, column in COLUMNS.items()]
    parts += ["## Output columns\n", _table(("column", "Arrow type", "what it holds"), columns)]
    parts.append("After these come the columns named by `--keep`, with the manifest's own types.\n")
    errors = [(f"`{e.code}`", e.stage, "yes" if e.retryable else "no", (e.__doc__ or "").strip()) for e in row_errors()]
    parts += [
        "## Error codes\n",
        'A row that fails is a row of the output with `status` "failed" and one of these in `error.code`.\n',
        _table(("code", "stage", "may pass", "meaning"), errors),
    ]
    return "\n".join(parts)


def _values(name: str, field: Any) -> str:
    hint = OPTION_TYPES[name]
    if get_origin(hint) is not None and str(get_origin(hint)) == "typing.Literal":
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if hint is bool:
        return f"`{flag(name)}` or `--no-{flag(name)[2:]}`"
    return f"`{field.metadata['metavar'] or 'TEXT'}`".replace("|", "\\|")


def _default(field: Any) -> str:
    text, value = field.metadata["help"], default(field)
    if "[default: " in text:
        return str(text.split("[default: ")[1].rstrip("]"))
    if value is None or value == ():
        return ""
    return "no" if value is False else f"`{value}`"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *(tuple(" ".join(cell.split()) for cell in row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
