"""The data that the stages exchange: a row of the manifest, a request to an engine, and its response.

All of these are small descriptors (about 1 KB): encoded images and pixels are in the arena (`ipc/arena.py`), and are
referred to by their position. They are msgspec structs and cross process boundaries as msgpack.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .errors import RowError


class Struct(msgspec.Struct, omit_defaults=True, frozen=True):
    """Base class of the exchanged structs."""


URL_SCHEMES = ("http", "https", "s3", "gs", "gcs", "abfs", "abfss", "az", "hf")
"""Schemes of the URLs of images: the web, object stores, and the Hugging Face Hub."""


class WebImage(Struct, frozen=True, tag="web"):
    """An image at a URL with one of URL_SCHEMES."""

    url: str


class FileImage(Struct, frozen=True, tag="file"):
    """An image in a file, or in a member of a tar archive."""

    path: str
    """An absolute path, or one relative to the manifest's directory; of a member, `ARCHIVE.tar#MEMBER`."""
    header: int | None = None
    """Offset of the member's first header, if it is known, so that nobody searches the archive for the member."""


class InlineImage(Struct, frozen=True, tag="inline"):
    """An encoded image that the manifest contains."""

    data: bytes
    source: str
    """A description of its place in the manifest, for messages."""


ImageRef = WebImage | FileImage | InlineImage


class Failure(Struct, frozen=True):
    """Why a row failed: the output column `error`."""

    code: str
    stage: str
    message: str
    retryable: bool = False

    @classmethod
    def of(cls, error: RowError) -> Failure:
        """Return the failure that an error describes.

        >>> from batchvl.errors import MissingFile
        >>> Failure.of(MissingFile("cat.jpg: no such file")).code
        'missing_file'
        """
        return cls(error.code, error.stage, str(error), error.retryable)


class Sampling(Struct, frozen=True):
    """How an answer is generated. The default is greedy decoding."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 is greedy decoding; above 0, each row uses its own seed."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Row(Struct, frozen=True):
    """A row of the manifest."""

    number: int
    """The row's identity: its 0-based position in the manifest's files, sorted by relative path."""
    id: int | str | None = None
    """The user's own label of the row."""
    prompt: str | list[str] | None = None
    """A list holds the user's turns of a conversation."""
    messages: list[Any] | None = None
    """A chat in OpenAI's format, used instead of `prompt`."""
    images: tuple[ImageRef, ...] = ()
    generation: dict[str, Any] | None = None
    columns: dict[str, Any] = {}
    """The columns that the prompt template inserts."""
    kept: dict[str, Any] = {}
    """The columns of `--keep`, which are copied to the output."""
    failure: Failure | None = None
    """Why the row cannot be read. The other fields then hold what could be read."""

    @property
    def inline_bytes(self) -> int:
        """Bytes of the images that the row itself contains."""
        return sum(len(image.data) for image in self.images if isinstance(image, InlineImage))


class ContentPart(Struct, frozen=True):
    """A part of a message: text, or an image."""

    text: str | None = None
    image: int | None = None
    """0-based index into the row's images."""


class Message(Struct, frozen=True):
    """A message of a chat."""

    role: str
    """ "system", "user" or "assistant"."""
    parts: tuple[ContentPart, ...]


class Extent(Struct, frozen=True):
    """A contiguous range of bytes in the arena."""

    start: int
    length: int


class Tensor(Struct, frozen=True):
    """An array in the arena, in C order and little endian."""

    name: str
    dtype: str
    """numpy's name of the type, such as "float32" or "int64", or "bfloat16"."""
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of its extent."""


class Image(Struct, frozen=True):
    """Facts about an image as it was read: an element of the output column `images`."""

    source: str
    """Its URL or path without secrets: no credentials or query of a URL, no data."""
    sha256: str | None = None
    """Hash of the encoded image."""
    width: int | None = None
    height: int | None = None
    """Size in pixels, after EXIF orientation is applied."""
    bytes: int | None = None
    """Size of the encoded image."""


class Request(Struct, frozen=True):
    """The request for one row, as an engine receives it."""

    row: int
    messages: tuple[Message, ...]
    """The conversation up to the first answer."""
    followups: tuple[Message, ...] = ()
    """User messages, each sent after the answer to the one before."""
    sampling: Sampling = Sampling()
    extent: Extent | None = None
    """The place of the prepared tensors in the arena, if there are any."""
    tensors: tuple[Tensor, ...] = ()
    cache_salt: int = 0
    """An engine may reuse cached images only among requests with the same salt."""


class Response(Struct, frozen=True):
    """An engine's response to one row: one text per turn, or a failure."""

    row: int
    texts: tuple[str, ...] = ()
    finish_reason: Literal["stop", "length"] | None = None
    input_tokens: int | None = None
    """Tokens of prompt and images, summed over the turns."""
    output_tokens: int | None = None
    failure: Failure | None = None
