"""What the stages hand each other: a row of the manifest, a request to the engine, its response.

All of them are descriptors of about 1 KB: pixels and picture bytes lie in the arena (`images/arena.py`) and are
named here by where they lie. They are msgspec structs, so they cross process borders as msgpack.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .errors import RowError


class Struct(msgspec.Struct, omit_defaults=True, frozen=True):
    """Base of everything that is handed over."""


class WebImage(Struct, frozen=True, tag="web"):
    """A picture behind an http or https URL."""

    url: str


class FileImage(Struct, frozen=True, tag="file"):
    """A picture in a file: an absolute path, or one relative to the manifest's folder."""

    path: str


class InlineImage(Struct, frozen=True, tag="inline"):
    """A picture's encoded bytes from the manifest itself; `source` says where they stood, for people."""

    data: bytes
    source: str


ImageRef = WebImage | FileImage | InlineImage


class Failure(Struct, frozen=True):
    """Why a row failed: the output column `error`."""

    code: str
    stage: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, error: RowError) -> Failure:
        """The failure that a row error stands for.

        >>> from batchvl.errors import MissingFile
        >>> Failure.of(MissingFile("cat.jpg: no such file")).code
        'missing_file'
        """
        return cls(error.code, error.stage, str(error), error.retryable)


class Sampling(Struct, frozen=True):
    """How answers are drawn. The defaults are greedy decoding."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy; above 0 each row draws with a seed of its own."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Row(Struct, frozen=True):
    """One row of the manifest."""

    number: int
    """The row's identity: its place, from 0, over the manifest's files sorted by relative path."""
    id: int | str | None = None
    """A label."""
    prompt: str | list[str] | None = None
    """A list is the turns of a conversation."""
    messages: list[Any] | None = None
    """OpenAI chat form, instead of a prompt."""
    images: tuple[ImageRef, ...] = ()
    generation: dict[str, Any] | None = None
    columns: dict[str, Any] = {}
    """The columns that the prompt's template names."""
    kept: dict[str, Any] = {}
    """The columns of `--keep`, for the output."""
    failure: Failure | None = None
    """Set where the row cannot be read: the other fields hold what could be."""

    @property
    def inline_bytes(self) -> int:
        """How many bytes of pictures the row itself carries."""
        return sum(len(image.data) for image in self.images if isinstance(image, InlineImage))


class ContentPart(Struct, frozen=True):
    """A piece of a message: text, or the row's picture with this number, from 0."""

    text: str | None = None
    image: int | None = None


class Message(Struct, frozen=True):
    """A message of a chat; role is "system", "user" or "assistant"."""

    role: str
    parts: tuple[ContentPart, ...]


class Extent(Struct, frozen=True):
    """A run of bytes in the arena."""

    start: int
    length: int


class Tensor(Struct, frozen=True):
    """An array in the arena: C order, little endian, `offset` bytes after its extent's start."""

    name: str
    dtype: str
    """numpy's name: "float32", "int64", …, or "bfloat16"."""
    shape: tuple[int, ...]
    offset: int


class Image(Struct, frozen=True):
    """A picture as it was read: an element of the output column `images`."""

    source: str
    """Without secrets: no user, password or query of a URL, no data."""
    sha256: str | None = None
    """Of the encoded bytes."""
    width: int | None = None
    height: int | None = None
    """Pixels, after the EXIF orientation is applied."""
    bytes: int | None = None
    """Of the encoded picture."""


class Request(Struct, frozen=True):
    """What the engine is asked for one row."""

    row: int
    messages: tuple[Message, ...]
    """The conversation up to the first answer."""
    followups: tuple[Message, ...] = ()
    """User messages, each asked after the answer to the one before."""
    sampling: Sampling = Sampling()
    extent: Extent | None = None
    """Where the prepared tensors lie, once there are any."""
    tensors: tuple[Tensor, ...] = ()
    cache_salt: int = 0
    """What an engine remembers of pictures is of use to rows with the same salt only."""


class Response(Struct, frozen=True):
    """The engine's answer to one row: texts, one a turn, or a failure."""

    row: int
    texts: tuple[str, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    input_tokens: int | None = None
    """Tokens of prompt and pictures, summed over the turns."""
    output_tokens: int | None = None
    failure: Failure | None = None
