"""Requests from rows: the text of each turn, and the places of images in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..config.options import PromptOptions, SamplingOptions
from ..config.units import pluralize
from ..errors import ImageCountMismatch, MissingPrompt, OptionError
from ..types import ContentPart, Message, Request, Row
from .chat import ChatMessage, parse_chat
from .sampling import RowSampling
from .template import Author, Segment, Template
from .tokens import IMAGE_TOKEN, Piece, Slot, TokenSplitter

DEFAULT_PROMPT = "describe this image"


class Prompter:
    """Make requests from rows.

    The prompt is `--prompt`, else the row's messages, else the row's prompt, else `describe this image` if the manifest
    has neither. A system message among the row's messages takes precedence over `--system`. Images without a place in
    the text go before the text of the first user message.

    Example:
        prompter = Prompter(PromptOptions(), SamplingOptions(), ["<|im_end|>"])
        request = prompter.request(Row(0, prompt="What is this?", images=(FileImage("cat.jpg"),)))

    Args:
        options: The prompt options.
        settings: The sampling options; a row's `generation` may change them.
        special_tokens: The model's special tokens, which rows must not use.

    Raises:
        OptionError: The options are invalid.
    """

    def __init__(self, options: PromptOptions, settings: SamplingOptions, special_tokens: Iterable[str] = ()) -> None:
        if options.prompt is not None and not options.prompt.strip():
            raise OptionError("--prompt: is empty; expected a question")
        if options.system is not None and IMAGE_TOKEN in options.system:
            raise OptionError(f"--system: found {IMAGE_TOKEN}, which only a prompt may have")
        self._options, self._sampling = options, RowSampling(settings)
        self._template = Template(options.prompt) if options.prompt is not None else None
        self._system = Message("system", (ContentPart(text=options.system),)) if options.system is not None else None
        self._tokens = TokenSplitter(special_tokens, options.special_tokens)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The model's special tokens that are escaped in rows."""
        return self._tokens.special_tokens

    def request(self, row: Row) -> Request:
        """Return the row's request.

        Raises:
            PromptError: The row cannot be asked; it fails.
        """
        sampling = self._sampling.for_row(row)
        if self._template is None and row.messages is not None:
            return Request(row.number, self._chat(row, row.messages), sampling=sampling)
        turns = [self._tokens.split(segments) for segments in self._turns(row)]
        first, *others = [Message("user", tuple(parts)) for parts in self._place(turns, len(row.images))]
        messages = (first,) if self._system is None else (self._system, first)
        return Request(row.number, messages, tuple(others), sampling)

    def _turns(self, row: Row) -> list[list[Segment]]:
        """Return the segments of each user turn."""
        template = self._template
        if template is not None and not template.uses_prompt_of(row):
            return [template.fill(row)]
        if template is None and row.prompt is None:
            if not row.images:
                raise MissingPrompt("found neither a prompt nor an image")
            return [[Segment(DEFAULT_PROMPT, Author.OPERATOR)]]
        prompts = row.prompt if isinstance(row.prompt, list) else [row.prompt]
        if not prompts:
            raise MissingPrompt("the prompt is an empty list")
        turns = []
        for at, prompt in enumerate(prompts, 1):
            if prompt is None or not prompt.strip():
                turn = f" of turn {at}" if len(prompts) > 1 else ""
                raise MissingPrompt(f"the prompt{turn} is null or empty")
            turns.append([Segment(prompt, Author.ROW)] if template is None else template.fill(row, prompt))
        return turns

    def _place(self, turns: Sequence[Sequence[Piece]], images: int) -> list[list[ContentPart]]:
        """Put images into the turns' slots, or before the first turn's text if there are no slots."""
        slots = sum([turn.count(Slot.IMAGE) for turn in turns])
        if slots == 0:
            return [self._lead(images if at == 0 else 0, _text_of(turn)) for at, turn in enumerate(turns)]
        if slots != images:
            raise ImageCountMismatch(f"found {slots} {IMAGE_TOKEN}, expected {images}, one for each image of the row")
        numbers = iter(range(images))
        return [_parts([next(numbers) if piece is Slot.IMAGE else piece for piece in turn]) for turn in turns]

    def _lead(self, images: int, text: str) -> list[ContentPart]:
        """Return images 0 to `images` - 1, then the text; with `--number-images`, each behind its number."""
        if not images:
            return [ContentPart(text=text)]
        if not self._options.number_images:
            return _parts([*range(images), text])
        pieces: list[Piece] = []
        for at in range(images):
            pieces += [("\n" if at else "") + f"Image-{at + 1}: ", at]
        return _parts([*pieces, "\n" + text])

    def _chat(self, row: Row, messages: list[Any]) -> tuple[Message, ...]:
        """Return a row's messages with their images, which image parts place or, if there are none, image tokens."""
        chat = parse_chat(messages)
        first_user = next(at for at, message in enumerate(chat) if message.role == "user")
        numbers = [piece for message in chat for piece in message.content if isinstance(piece, int)]
        turns = [self._split_message(message, places_images=not numbers) for message in chat]
        self._check_question(turns[-1], has_leading_images=bool(row.images) and first_user == len(chat) - 1)
        if numbers:
            contents = self._place_numbered(turns, numbers, first_user, len(row.images))
        else:
            before = [[ContentPart(text=_text_of(turn))] for turn in turns[:first_user]]
            contents = before + self._place(turns[first_user:], len(row.images))
        placed = [Message(message.role, tuple(parts)) for message, parts in zip(chat, contents, strict=True)]
        if self._system is not None and chat[0].role != "system":
            placed.insert(0, self._system)
        return tuple(placed)

    def _split_message(self, message: ChatMessage, *, places_images: bool) -> list[Piece]:
        """Return a message's pieces. places_images: whether image tokens of the user are slots."""
        pieces: list[Piece] = []
        for piece in message.content:
            if isinstance(piece, int):
                pieces.append(piece)
            else:
                author = Author.ROW if places_images and message.role == "user" else Author.VALUE
                pieces += self._tokens.split([Segment(piece, author)])
        return pieces

    @staticmethod
    def _check_question(turn: Sequence[Piece], *, has_leading_images: bool) -> None:
        """Check that the last message has text or an image."""
        has_content = any(not isinstance(piece, str) or piece.strip() for piece in turn)
        if not has_content and not has_leading_images:
            raise MissingPrompt("the user's last message is empty")

    def _place_numbered(
        self, turns: Sequence[Sequence[Piece]], numbers: list[int], first_user: int, images: int
    ) -> list[list[ContentPart]]:
        """Return the messages' parts. Images without a part have the lowest numbers: they lead the user's first text.

        Args:
            turns: The messages' texts and numbers of images.
            numbers: The numbers of the images that have parts.
            first_user: Which of the messages is the user's first.
            images: The number of images that the row has.
        """
        leading = numbers[0]
        if numbers != list(range(leading, images)):
            raise ImageCountMismatch(
                f"found {pluralize(len(numbers), 'image part')} in messages, expected {images - leading}"
            )
        contents = [_parts(turn) for turn in turns]
        if leading:
            contents[first_user] = [*self._lead(leading, ""), *contents[first_user]]
        return contents


def _text_of(turn: Sequence[Piece]) -> str:
    return "".join([piece for piece in turn if isinstance(piece, str)])


def _parts(pieces: Iterable[Piece]) -> list[ContentPart]:
    """Return the parts of a message. Empty texts are left out; slots must have been replaced by numbers."""
    parts = []
    for piece in pieces:
        if isinstance(piece, int):
            parts.append(ContentPart(image=piece))
        elif isinstance(piece, str) and piece:
            parts.append(ContentPart(text=piece))
    return parts
