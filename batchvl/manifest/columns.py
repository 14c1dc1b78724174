"""Which columns of a manifest are read, and what each is for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from ..config.options import ManifestOptions, flag
from ..errors import ManifestError


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns by what they are for; None for one that the manifest lacks."""

    id: str | None = None
    prompt: str | None = None
    messages: str | None = None
    images: str | None = None
    image: str | None = None
    """Read where `images` is null."""
    generation: str | None = None
    template: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()

    @property
    def read(self) -> tuple[str, ...]:
        """Every column that is read, once."""
        single = (self.id, self.prompt, self.messages, self.images, self.image, self.generation)
        return tuple(dict.fromkeys(name for name in (*single, *self.template, *self.keep) if name is not None))

    @property
    def has_prompts(self) -> bool:
        """Whether rows bring a question of their own."""
        return self.prompt is not None or self.messages is not None


_DEFAULTS = {f.name: f.default for f in fields(ManifestOptions)}


def choose(options: ManifestOptions, template: Iterable[str], available: tuple[str, ...], where: str) -> Columns:
    """The columns to read of those that are there.

    A column that an option names must be there; the defaults need not. Naming one of `--prompt-column` and
    `--messages-column` leaves the other's default column unread. `{prompt}` in a template is the row's own prompt,
    whichever column that is. Raises ManifestError naming the columns that are there and the flag.
    """

    def missing(name: str, told_by: str) -> ManifestError:
        there = ", ".join(map(repr, available[:40])) + (", …" if len(available) > 40 else "") or "none"
        return ManifestError(f"{where}: no column {name!r}, which {told_by} names; the columns are {there}")

    def named(option: str) -> str | None:
        name: str | None = getattr(options, option)
        if name is not None and name in available:
            return name
        if name != _DEFAULTS[option]:
            raise missing(str(name), flag(option))
        return None

    prompt, messages = named("prompt_column"), named("messages_column")
    if prompt != _DEFAULTS["prompt_column"] and messages == _DEFAULTS["messages_column"] and prompt is not None:
        messages = None
    elif messages != _DEFAULTS["messages_column"] and prompt == _DEFAULTS["prompt_column"] and messages is not None:
        prompt = None
    if options.image_column is None:
        images, image = ("images" if "images" in available else None), ("image" if "image" in available else None)
    else:
        images, image = named("image_column"), None
    for name in options.keep:
        if name not in available:
            raise missing(name, "--keep")
    own = {"prompt"} if prompt is not None else set()
    wanted = tuple(dict.fromkeys(name for name in template if name not in own))
    for name in wanted:
        if name not in available:
            raise missing(name, "the prompt's template")
    return Columns(
        named("id_column"), prompt, messages, images, image, named("generation_column"), wanted,
        tuple(dict.fromkeys(options.keep)),
    )  # fmt: skip
