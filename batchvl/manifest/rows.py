"""Cells to rows: `RowMaker`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ..errors import InvalidMessages, InvalidRow, RowError
from ..types import Failure, ImageRef, Row
from .columns import Columns
from .image_refs import image_of, images_of

IdType = Literal["int64", "string"]

_decode_json = msgspec.json.Decoder().decode
_INT64 = range(-(2**63), 2**63)


class RowMaker:
    """Makes rows of cells that come in the order of `Columns.read`.

    `json_lists`: a picture's cell that begins with `[` is a list in JSON, since CSV has no lists. `keep_text`: kept
    values become strings, as JSON where they are none.
    """

    def __init__(
        self, columns: Columns, id_type: IdType | None, *, json_lists: bool = False, keep_text: bool = False
    ) -> None:
        at = {name: index for index, name in enumerate(columns.read)}
        # A column that is not there is read from the None at the end of the cells.
        self._id, self._prompt, self._messages, self._images, self._image, self._generation = (
            at.get(name, -1) if name is not None else -1
            for name in (
                columns.id, columns.prompt, columns.messages, columns.images, columns.image, columns.generation,
            )
        )  # fmt: skip
        self._template = [(name, at[name]) for name in columns.template]
        self._keep = [(name, at[name]) for name in columns.keep]
        self._id_type, self._json_lists, self._keep_text = id_type, json_lists, keep_text
        self._has_prompts = columns.has_prompts
        self._images_name, self._image_name = columns.images or "images", columns.image or "image"

    def row(self, number: int, cells: Sequence[Any] | RowError) -> Row:
        """The row; `failure` is set where the cells, or the error in their place, make no good one."""
        if isinstance(cells, RowError):
            return Row(number, failure=Failure.of(cells))
        cells = (*cells, None)
        failure = None
        id: int | str | None = None
        prompt = messages = generation = None
        images: list[ImageRef] = []
        try:
            if (label := cells[self._id]) is not None:
                id = self._label(label)
            if (prompt := cells[self._prompt]) is not None and type(prompt) is not str:
                prompt = _turns(prompt)
            if (generation := cells[self._generation]) is not None:
                generation = _settings(generation)
            if (cell := cells[self._images]) is not None:
                images = self._pictures(cell, self._images_name)
            elif (cell := cells[self._image]) is not None:
                images = self._pictures(cell, self._image_name)
            if (messages := cells[self._messages]) is not None:
                messages, images = _place(_chat(messages), images)
            elif prompt is None and self._has_prompts:
                prompt = ""  # None is for manifests that ask nothing: this row should have, and fails in `prompt.py`
        except RowError as error:
            failure = Failure.of(error)
            # What was not read must not be taken for what stands there.
            prompt, messages, generation, images = None, None, None, []
        return Row(
            number, id, prompt, messages, tuple(images), generation,
            {name: cells[at] for name, at in self._template} if self._template else {},
            {name: self._kept(cells[at]) for name, at in self._keep} if self._keep else {},
            failure,
        )  # fmt: skip

    def label(self, cells: Sequence[Any] | RowError) -> int | str | None:
        """The row's id alone; None also for a bad one."""
        if isinstance(cells, RowError) or (id := cells[self._id]) is None:
            return None
        try:
            return self._label(id)
        except InvalidRow:
            return None

    def _label(self, id: Any) -> int | str | None:
        kind = type(id)
        if self._id_type == "string":
            if kind is str or kind is int:
                return str(id)
        elif self._id_type == "int64":
            if kind is int and id in _INT64:
                return int(id)
        else:
            return None
        shown = repr(id) if kind in (int, str, float, bool) and len(str(id)) <= 60 else kind.__name__
        wanted = "a string" if self._id_type == "string" else "a 64-bit integer, as the first rows have"
        raise InvalidRow(f"id: found {shown}, want {wanted}")

    def _pictures(self, cell: Any, what: str) -> list[ImageRef]:
        if self._json_lists and type(cell) is str and cell.lstrip()[:1] == "[":
            cell = _parsed(cell, what, InvalidRow)
        return images_of(cell, what)

    def _kept(self, value: Any) -> Any:
        if not self._keep_text or value is None or type(value) is str:
            return value
        return json.dumps(value, ensure_ascii=False)


def _parsed(text: str, what: str, error: type[RowError]) -> Any:
    try:
        return _decode_json(text)
    except (msgspec.DecodeError, ValueError, RecursionError) as reason:
        raise error(f"{what}: a string that is not JSON: {reason}") from None


def _turns(prompt: Any) -> list[str]:
    if isinstance(prompt, list) and all(type(turn) is str for turn in prompt):
        return prompt
    found = type(prompt).__name__
    if isinstance(prompt, list):
        found = "a list with " + next("null" if t is None else type(t).__name__ for t in prompt if type(t) is not str)
    raise InvalidRow(f"prompt: found {found}, want a string or a list of strings")


def _settings(generation: Any) -> dict[str, Any]:
    if type(generation) is str:
        generation = _parsed(generation, "generation", InvalidRow)
    if isinstance(generation, list) and all(isinstance(pair, tuple) for pair in generation):
        generation = dict(generation)  # an Arrow map
    if not isinstance(generation, dict):
        raise InvalidRow(f"generation: found {type(generation).__name__}, want an object of sampling settings")
    return {name: value for name, value in generation.items() if value is not None}


def _chat(messages: Any) -> list[Any]:
    if type(messages) is str:
        messages = _parsed(messages, "messages", InvalidMessages)
    if not isinstance(messages, list):
        raise InvalidMessages(f"messages: found {type(messages).__name__}, want a list of messages")
    return messages


def _place(messages: list[Any], column: list[ImageRef]) -> tuple[list[Any], list[ImageRef]]:
    """The messages with each picture replaced by its number among the row's images, and those images.

    A picture part without a source, `{"type": "image"}`, takes the next picture of the column. Where there is none
    of these, the column's pictures come first, as they are placed before the text. What is no chat passes unchanged:
    `prompt.py` refuses it.
    """
    sources = [_source(part) for message in messages for part in _parts(message) if _is_picture(part)]
    if not sources:
        return messages, column
    waiting = iter(column)
    images = [] if None in sources else list(column)
    number = len(images)
    # A placeholder that finds no picture is numbered all the same: `prompt.py` counts, and tells.
    numbers = iter(range(number, number + len(sources)))
    for at, source in enumerate(sources, 1):
        if source is not None:
            images.append(image_of(source, f"messages, picture {at}"))
        elif (picture := next(waiting, None)) is not None:
            images.append(picture)
    if not number:
        images.extend(waiting)
    placed = [
        {
            **message,
            "content": [
                {"type": "image", "image": next(numbers)} if _is_picture(part) else part for part in _parts(message)
            ],
        }
        if _parts(message)
        else message
        for message in messages
    ]
    return placed, images


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_picture(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _source(part: dict[str, Any]) -> Any:
    """Where a picture part says the picture is; None for a placeholder."""
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise InvalidMessages('messages: an image_url part without {"image_url": {"url": …}}')
        return url
    return next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
