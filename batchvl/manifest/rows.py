"""From a row's cells to a `Row`: checks types and parses JSON in cells."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ..errors import InvalidMessages, InvalidRow, RowError
from ..types import Failure, ImageRef, Row
from .chat_images import number_images
from .columns import Columns
from .image_refs import images_of, plain_value

IdType = Literal["int64", "string"]

_decode_json = msgspec.json.Decoder().decode
_INT64 = range(-(2**63), 2**63)
_MAX_SHOWN = 60  # characters of a bad value


class RowMaker:
    """Make rows of cells that come in the order of `Columns.names`.

    Args:
        columns: The columns by role.
        id_type: The type of ids; None: rows have none.
        json_lists: An image cell that begins with `[` is a JSON list, since CSV has no lists.
        keep_text: Kept values become strings: JSON, if they are not strings already.
    """

    def __init__(
        self, columns: Columns, id_type: IdType | None, *, json_lists: bool = False, keep_text: bool = False
    ) -> None:
        index = {name: at for at, name in enumerate(columns.names)}

        def index_of(name: str | None) -> int:
            # A missing column is read from the None that `row` adds behind the last cell.
            return -1 if name is None else index.get(name, -1)

        self._id, self._generation = index_of(columns.id), index_of(columns.generation)
        self._prompt, self._messages = index_of(columns.prompt), index_of(columns.messages)
        self._images, self._image = index_of(columns.images), index_of(columns.image)
        self._template = [(name, index[name]) for name in columns.template]
        self._keep = [(name, index[name]) for name in columns.keep]
        self._id_type, self._json_lists, self._keep_text = id_type, json_lists, keep_text
        self._has_prompts = columns.has_prompts
        self._images_name, self._image_name = columns.images or "images", columns.image or "image"

    def row(self, number: int, cells: Sequence[Any] | RowError) -> Row:
        """Return the row. Its `failure` is set if its cells are bad or could not be read."""
        if isinstance(cells, RowError):
            return Row(number, failure=Failure.of(cells))
        cells = (*cells, None)
        id = prompt = messages = generation = failure = None
        images: list[ImageRef] = []
        try:
            if (value := cells[self._id]) is not None:
                id = self._check_id(value)
            prompt, messages, generation, images = self._request_fields(cells)
        except RowError as error:
            failure = Failure.of(error)
        return Row(
            number,
            id,
            prompt,
            messages,
            tuple(images),
            generation,
            {name: plain_value(cells[at]) for name, at in self._template} if self._template else {},
            {name: self._kept(cells[at]) for name, at in self._keep} if self._keep else {},
            failure,
        )

    def id(self, cells: Sequence[Any] | RowError) -> int | str | None:
        """Return the row's id alone; None if it is missing or bad."""
        if isinstance(cells, RowError) or (value := cells[self._id]) is None:
            return None
        try:
            return self._check_id(value)
        except InvalidRow:
            return None

    def _request_fields(
        self, cells: Sequence[Any]
    ) -> tuple[str | list[str] | None, list[Any] | None, dict[str, Any] | None, list[ImageRef]]:
        """Return prompt, messages, generation and images. Raises RowError."""
        if (prompt := cells[self._prompt]) is not None and type(prompt) is not str:
            prompt = _parse_turns(prompt)
        if (generation := cells[self._generation]) is not None:
            generation = _parse_generation(generation)
        images: list[ImageRef] = []
        if (cell := cells[self._images]) is not None:
            images = self._parse_images(cell, self._images_name)
        elif (cell := cells[self._image]) is not None:
            images = self._parse_images(cell, self._image_name)
        if (messages := cells[self._messages]) is not None:
            messages, images = number_images(_parse_messages(messages), images)
        elif prompt is None and self._has_prompts:
            # None is for manifests without prompts. This row should have one: the empty string fails in `Prompter`.
            prompt = ""
        return prompt, messages, generation, images

    def _check_id(self, value: Any) -> int | str | None:
        kind = type(value)
        if self._id_type == "string":
            if kind is str or kind is int:
                return str(value)
        elif self._id_type == "int64":
            if kind is int and value in _INT64:
                return int(value)
        else:
            return None
        is_short = kind in (int, str, float, bool) and len(str(value)) <= _MAX_SHOWN
        wanted = "a string" if self._id_type == "string" else "a 64-bit integer, as the first rows have"
        raise InvalidRow(f"id: found {repr(value) if is_short else kind.__name__}, expected {wanted}")

    def _parse_images(self, cell: Any, column: str) -> list[ImageRef]:
        if self._json_lists and type(cell) is str and cell.lstrip()[:1] == "[":
            cell = _parse_json(cell, column, InvalidRow)
        return images_of(cell, column)

    def _kept(self, cell: Any) -> Any:
        value = plain_value(cell)
        if not self._keep_text or value is None or type(value) is str:
            return value
        return json.dumps(value, ensure_ascii=False)


def _parse_json(text: str, column: str, error: type[RowError]) -> Any:
    try:
        return _decode_json(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as reason:
        raise error(f"{column}: found a string that is not JSON: {reason}") from None


def _parse_turns(prompt: Any) -> list[str]:
    if not isinstance(prompt, list):
        raise InvalidRow(f"prompt: found {type(prompt).__name__}, expected a string or a list of strings")
    for turn in prompt:
        if type(turn) is not str:
            kind = "null" if turn is None else type(turn).__name__
            raise InvalidRow(f"prompt: found a list with {kind}, expected a string or a list of strings")
    return prompt


def _parse_generation(generation: Any) -> dict[str, Any]:
    if type(generation) is str:
        generation = _parse_json(generation, "generation", InvalidRow)
    if isinstance(generation, list) and all(isinstance(pair, tuple) for pair in generation):
        generation = dict(generation)  # an Arrow map
    if not isinstance(generation, dict):
        raise InvalidRow(f"generation: found {type(generation).__name__}, expected an object of sampling settings")
    return {name: value for name, value in generation.items() if value is not None}


def _parse_messages(messages: Any) -> list[Any]:
    if type(messages) is str:
        messages = _parse_json(messages, "messages", InvalidMessages)
    if not isinstance(messages, list):
        raise InvalidMessages(f"messages: found {type(messages).__name__}, expected a list of messages")
    return messages
