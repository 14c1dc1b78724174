"""Rows to requests: templates, the places of pictures and special tokens.

Text is composed of segments, by who wrote them: the operator (`--prompt`), the row's own prompt, or a value that is
put into a template. `<IMAGE_TOKEN>` places a picture in the first two; special tokens of the model stay whole only in
the first. Everywhere else both are escaped by a space after their first character: `< |im_end|>`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from ..config.options import PromptOptions, SamplingOptions
from ..errors import ImageCountMismatch, InvalidMessages, ManifestError, MissingPrompt, OptionError, SpecialToken
from ..types import ContentPart, Message, Request, Row
from .sampling import RowSampling

DEFAULT_PROMPT = "describe this image"
IMAGE_TOKEN = "<IMAGE_TOKEN>"

_FIELD = re.compile(r"\{([^{}]*)\}")
_PLACE = object()
"""Stands for a picture among texts, until all are counted."""


class _Segment(NamedTuple):
    text: str
    places_pictures: bool
    keeps_tokens: bool


def template_columns(prompt: str, available: Iterable[str]) -> tuple[str, ...]:
    """The columns that a template names, of those available.

    Braces around anything that is no column are text, such as JSON's. But a name alone, `{caption}`, must be a column,
    unless its braces are doubled. Raises ManifestError listing the columns.

    >>> template_columns('{caption} as {"json": {}}', ["caption", "url"])
    ('caption',)
    """
    columns = list(available)
    found: dict[str, None] = {}
    for match in _FIELD.finditer(prompt):
        name = match[1]
        if name in columns:
            found[name] = None
        elif name.isidentifier() and (prompt[match.start() - 1 : match.start()], prompt[match.end() :][:1]) != (
            "{",
            "}",
        ):
            there = ", ".join(map(repr, columns[:40])) + (", …" if len(columns) > 40 else "") or "none"
            raise ManifestError(f"--prompt: no column {name!r} for {match[0]}; the columns are {there}")
    return tuple(found)


def breakable(tokens: Iterable[str]) -> tuple[str, ...]:
    """The tokens, each once, that a space after their first character breaks up: not those of a single one."""
    return tuple(token for token in dict.fromkeys(tokens) if len(token) > 1)


def either(tokens: Iterable[str]) -> str:
    """A pattern of any of the tokens, the longest first.

    >>> either(["<i>", "<i>b"])
    '<i>b|<i>'
    """
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


class Prompter:
    """Makes requests of rows.

    The prompt is `--prompt`, else the row's messages, else its prompt, else `describe this image`, if the manifest has
    neither. A system message among the row's messages wins over `--system`. Pictures whose places are not given go
    before the text of the first user message.

    Raises OptionError for options that cannot be.

        prompter = Prompter(PromptOptions(), SamplingOptions(), ["<|im_end|>"])
        request = prompter.request(Row(0, prompt="What is this?", images=(FileImage("cat.jpg"),)))
    """

    def __init__(self, options: PromptOptions, settings: SamplingOptions, special_tokens: Iterable[str] = ()) -> None:
        if options.prompt is not None and not options.prompt.strip():
            raise OptionError("--prompt: is empty; want a question")
        if options.system is not None and IMAGE_TOKEN in options.system:
            raise OptionError(f"--system: holds {IMAGE_TOKEN}; pictures stand in the prompt")
        self._options, self._sampling = options, RowSampling(settings)
        # Text and names take turns: text, name, text, …
        self._template = _FIELD.split(options.prompt) if options.prompt is not None else None
        self._system = Message("system", (ContentPart(text=options.system),)) if options.system is not None else None
        self.special_tokens = breakable(special_tokens)
        """The model's, which no row may bring."""
        self._tokens = re.compile(either({IMAGE_TOKEN, *self.special_tokens}))

    def request(self, row: Row) -> Request:
        """The row as the engine is asked. Raises a PromptError: the row alone fails."""
        sampling = self._sampling.of(row)
        if self._template is None and row.messages is not None:
            return Request(row.number, self._chat(row), sampling=sampling)
        turns = [self._split(segments) for segments in self._turns(row)]
        first, *others = [Message("user", tuple(parts)) for parts in self._placed(turns, len(row.images))]
        messages = (first,) if self._system is None else (self._system, first)
        return Request(row.number, messages, tuple(others), sampling)

    def _turns(self, row: Row) -> list[list[_Segment]]:
        prompts = row.prompt if isinstance(row.prompt, list) else [row.prompt]
        if self._template is None:
            if row.prompt is None:
                if not row.images:
                    raise MissingPrompt("neither a prompt nor a picture")
                return [[_Segment(DEFAULT_PROMPT, True, True)]]
        elif "prompt" not in self._template[1::2] or "prompt" in row.columns:
            return [self._filled(row, None)]
        turns = []
        for at, prompt in enumerate(prompts, 1):
            if prompt is None or not prompt.strip():
                turn = f" of turn {at}" if len(prompts) > 1 else ""
                raise MissingPrompt(f"the prompt{turn} is null or empty")
            turns.append([_Segment(prompt, True, False)] if self._template is None else self._filled(row, prompt))
        if not turns:
            raise MissingPrompt("the prompt is an empty list")
        return turns

    def _filled(self, row: Row, prompt: str | None) -> list[_Segment]:
        """The template's segments. Values are never looked at as templates again."""
        assert self._template is not None
        segments = []
        for at, piece in enumerate(self._template):
            if at % 2 == 0:
                segments.append(_Segment(piece, True, True))
            elif piece in row.columns:
                value = row.columns[piece]
                if value is None:
                    raise MissingPrompt(f"column {piece!r}, which the prompt names, is null")
                segments.append(_Segment(_text(value), False, False))
            elif piece == "prompt" and prompt is not None:
                segments.append(_Segment(prompt, True, False))
            else:
                segments.append(_Segment("{" + piece + "}", True, True))
        return segments

    def _split(self, segments: list[_Segment]) -> list[Any]:
        """Texts and, where a picture goes, `_PLACE`; tokens are escaped or refused."""
        text = segments[0].text if len(segments) == 1 else "".join([segment.text for segment in segments])
        match = self._tokens.search(text)
        if match is None:
            return [text]
        pieces: list[Any] = []
        written: list[str] = []
        done = 0
        while match is not None:
            owner = _owner(segments, match.start(), match.end())
            token = match[0]
            written.append(text[done : match.start()])
            done = match.end()
            if token == IMAGE_TOKEN and owner is not None and owner.places_pictures:
                pieces += ["".join(written), _PLACE]
                written = []
            elif token != IMAGE_TOKEN and owner is not None and owner.keeps_tokens:
                written.append(token)
            elif self._options.special_tokens == "fail":
                raise SpecialToken(f"the row holds {token!r}, and --special-tokens is fail")
            else:
                # What begins inside the token may be another one: go on right behind its first character.
                written += [token[0], " "]
                done = match.start() + 1
            match = self._tokens.search(text, done)
        return [*pieces, "".join([*written, text[done:]])]

    def _placed(self, turns: list[list[Any]], pictures: int) -> list[list[ContentPart]]:
        """The turns with pictures in their places, or first where no turn has a place."""
        if pictures == 0 and all(len(turn) == 1 for turn in turns):
            return [[ContentPart(text=turn[0])] for turn in turns]
        places = sum(piece is _PLACE for turn in turns for piece in turn)
        if places == 0:
            return [self._led(turn[0], pictures if at == 0 else 0) for at, turn in enumerate(turns)]
        if places != pictures:
            raise ImageCountMismatch(f"found {places} {IMAGE_TOKEN}, want {pictures}, one for each picture of the row")
        numbers = iter(range(pictures))
        return [
            [
                ContentPart(image=next(numbers)) if piece is _PLACE else ContentPart(text=piece)
                for piece in turn
                if piece
            ]
            for turn in turns
        ]

    def _led(self, text: str, pictures: int) -> list[ContentPart]:
        """Pictures, then the text; with `--number-images`, each behind its number."""
        if not self._options.number_images:
            return [*(ContentPart(image=at) for at in range(pictures)), *([ContentPart(text=text)] if text else [])]
        parts = []
        for at in range(pictures):
            parts += [ContentPart(text=("\n" if at else "") + f"Image-{at + 1}: "), ContentPart(image=at)]
        return [*parts, ContentPart(text="\n" + text if pictures else text)]

    def _chat(self, row: Row) -> tuple[Message, ...]:
        """A row's messages. They place pictures by parts, or, where they have none of these, as a prompt does."""
        assert row.messages is not None
        chat = [_message(at, message) for at, message in enumerate(row.messages)]
        if not chat or chat[-1][0] != "user":
            raise InvalidMessages(f"messages end with {chat[-1][0] if chat else 'nothing'}, want the user's turn")
        numbers = [part for _, content in chat for part in content if isinstance(part, int)]
        first = next((at for at, (role, _) in enumerate(chat) if role == "user"))
        split: list[list[Any]] = []
        for role, content in chat:
            placing = role == "user" and not numbers
            pieces: list[Any] = []
            for part in content:
                pieces += [part] if isinstance(part, int) else self._split([_Segment(part, placing, False)])
            split.append(pieces)
        asks = any(not isinstance(piece, str) or piece.strip() for piece in split[-1])
        if not asks and not (row.images and first == len(chat) - 1):
            raise MissingPrompt("the user's last message is empty")
        parts = self._numbered(split, numbers, first, len(row.images))
        messages = [Message(role, tuple(content)) for (role, _), content in zip(chat, parts, strict=True)]
        if self._system is not None and chat[0][0] != "system":
            messages.insert(0, self._system)
        return tuple(messages)

    def _numbered(
        self, split: list[list[Any]], numbers: list[int], first: int, pictures: int
    ) -> list[list[ContentPart]]:
        if not numbers:
            users = self._placed([split[first], *split[first + 1 :]], pictures)
            return [[ContentPart(text=piece) for piece in pieces] for pieces in split[:first]] + users
        # Pictures of the column come before those of the parts, and lead the text.
        leading = numbers[0]
        if numbers != list(range(leading, pictures)):
            raise ImageCountMismatch(f"found {len(numbers)} picture parts in messages, want {pictures - leading}")
        parts = [
            [
                ContentPart(image=piece) if isinstance(piece, int) else ContentPart(text=piece)
                for piece in pieces
                if piece != ""
            ]
            for pieces in split
        ]
        parts[first] = [*self._led("", leading), *parts[first]] if leading else parts[first]
        return parts


def _owner(segments: list[_Segment], start: int, end: int) -> _Segment | None:
    """The segment that a token lies in; None where it lies in several, which is to say that nobody wrote it."""
    at = 0
    for segment in segments:
        if at <= start and end <= at + len(segment.text):
            return segment
        at += len(segment.text)
    return None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _message(at: int, message: Any) -> tuple[str, list[str | int]]:
    """A message's role, and its texts and pictures' numbers; texts in a row are joined by a line feed."""
    if not isinstance(message, dict):
        raise InvalidMessages(f"messages[{at}]: found {type(message).__name__}, want an object with role and content")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant") or (role == "system" and at):
        where = ", a system message only at the beginning" if role == "system" else ""
        raise InvalidMessages(f"messages[{at}]: found role {role!r:.40}, want system, user or assistant{where}")
    if isinstance(content, str):
        return role, [content]
    if not isinstance(content, list):
        found = type(content).__name__
        raise InvalidMessages(f"messages[{at}]: found content of type {found}, want a string or a list of parts")
    parts: list[str | int] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            if parts and isinstance(parts[-1], str):
                parts[-1] += "\n" + part["text"]
            else:
                parts.append(part["text"])
        elif kind == "image" and type(part.get("image")) is int:
            if role != "user":
                raise InvalidMessages(f"messages[{at}]: a picture in a message of the {role}, want it in the user's")
            parts.append(part["image"])
        else:
            raise InvalidMessages(f"messages[{at}]: found a part of type {kind!r:.40}, want text, image_url or image")
    return role, parts or [""]
