"""The columns of a manifest that a run reads, by role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from ..config.options import ManifestOptions, flag
from ..errors import ManifestError
from ..prompts.template import quote_names


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names by role; None for a role that no column has."""

    id: str | None = None
    prompt: str | None = None
    messages: str | None = None
    images: str | None = None
    image: str | None = None
    """Read in rows where `images` is null."""
    generation: str | None = None
    template: tuple[str, ...] = ()
    """Columns that the prompt template names."""
    keep: tuple[str, ...] = ()
    """Columns that are copied to the output."""

    @property
    def names(self) -> tuple[str, ...]:
        """The columns to read, without repetitions. Readers return cells in this order."""
        single = (self.id, self.prompt, self.messages, self.images, self.image, self.generation)
        return tuple(dict.fromkeys(name for name in (*single, *self.template, *self.keep) if name is not None))

    @property
    def has_prompts(self) -> bool:
        """Whether rows have prompts of their own."""
        return self.prompt is not None or self.messages is not None


_DEFAULTS = {field.name: field.default for field in fields(ManifestOptions)}


def choose_columns(
    options: ManifestOptions,
    template: Iterable[str],
    available: tuple[str, ...],
    where: str,
    defaults: Mapping[str, str] | None = None,
) -> Columns:
    """Assign the available columns to roles.

    A column that an option names must exist; a default column need not. If only one of `--prompt-column` and
    `--messages-column` is given, the other's default column is not read. `{prompt}` in a template is the row's own
    prompt, whichever column holds it.

    Args:
        options: The column options.
        template: The columns that the prompt template names.
        available: The columns that the manifest has.
        where: The manifest, for error messages.
        defaults: By option, the format's own columns for roles that no column has by its name.

    Raises:
        ManifestError: A named column does not exist. The message lists those that do.
    """
    choice = _Choice(options, available, where, defaults or {})
    prompt, messages = choice.prompts()
    images, image = choice.images()
    return Columns(
        id=choice.named("id_column"),
        prompt=prompt,
        messages=messages,
        images=images,
        image=image,
        generation=choice.named("generation_column"),
        template=choice.all_of((n for n in template if n != "prompt" or prompt is None), "the prompt template"),
        keep=choice.all_of(options.keep, "--keep"),
    )


class _Choice:
    """Looks up the columns that options name among those available."""

    def __init__(
        self, options: ManifestOptions, available: tuple[str, ...], where: str, defaults: Mapping[str, str]
    ) -> None:
        self._options, self._available, self._where, self._defaults = options, available, where, defaults

    def prompts(self) -> tuple[str | None, str | None]:
        """Return the columns of prompts and of messages."""
        prompt, messages = self.named("prompt_column"), self.named("messages_column")
        prompt_given, messages_given = self._is_given("prompt_column"), self._is_given("messages_column")
        if prompt_given and not messages_given:
            return prompt, None
        if messages_given and not prompt_given:
            return None, messages
        return prompt, messages

    def images(self) -> tuple[str | None, str | None]:
        """Return the column of images and the one that is read where the first is null."""
        if self._is_given("image_column"):
            return self.named("image_column"), None
        images, image = self._if_available("images"), self._if_available("image")
        return images, image if images or image else self._defaults.get("image_column")

    def named(self, option: str) -> str | None:
        """Return the column that an option names; None if its default column does not exist."""
        name: str = getattr(self._options, option)
        if name in self._available:
            return name
        if self._is_given(option):
            raise self._missing(name, flag(option))
        return self._defaults.get(option)

    def all_of(self, names: Iterable[str], source: str) -> tuple[str, ...]:
        """Return the names without repetitions. Each must exist."""
        names = tuple(dict.fromkeys(names))
        for name in names:
            if name not in self._available:
                raise self._missing(name, source)
        return names

    def _is_given(self, option: str) -> bool:
        return bool(getattr(self._options, option) != _DEFAULTS[option])

    def _if_available(self, name: str) -> str | None:
        return name if name in self._available else None

    def _missing(self, name: str, source: str) -> ManifestError:
        there = quote_names(self._available)
        return ManifestError(f"{self._where}: no column {name!r}, which {source} names; the columns are {there}")
