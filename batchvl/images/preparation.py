"""How image workers prepare the inputs of an engine: the interface between `images` and `engines`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec

from ..types import Image, Request, Struct

if TYPE_CHECKING:
    import numpy
    import PIL.Image


class PreparationSpec(Struct, frozen=True):
    """What image workers make of a row for an engine. Names code instead of holding it, so it can be sent to them."""

    factory: str | None = None
    """ "package.module:callable" that returns a `Preparation`. The workers' host process calls it once with `options`
    as keywords. None if `input` is "encoded"."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    input: Literal["pixels", "encoded"] = "pixels"
    """What the engine takes: "pixels" are the arrays that the `Preparation` makes of decoded images. "encoded" are the
    original bytes, for engines that decode images themselves, such as servers: workers decode each image only to check
    it, and the engine gets a uint8 tensor "image0", "image1", … for each of the row's images."""
    prepares_text: bool = False
    """Whether rows without images go through the workers as well, to be tokenized."""
    special_tokens: tuple[str, ...] = ()
    """Special tokens of the tokenizer, which are escaped or refused in a row's values."""

    def __post_init__(self) -> None:
        if (self.factory is None) != (self.input == "encoded"):
            raise ValueError(f"input {self.input!r} with factory {self.factory!r}: only pixels have a factory")


Array: TypeAlias = "bytes | numpy.ndarray"


class Preparation(Protocol):
    """Makes the inputs of one row from its images. Loaded once in the workers' host process, used by each worker."""

    def prepare(
        self, request: Request, images: Sequence[PIL.Image.Image], infos: Sequence[Image] = (), /
    ) -> Mapping[str, Array]:
        """Return named arrays for the engine.

        For several requests about the same images, this is called with the same list, one request after the other.
        What is made of the images alone may be kept until the next list, and is stored in the arena once.

        Args:
            request: The row's request.
            images: Images in the row's order: RGB, EXIF orientation applied.
            infos: What is known of each image's file.

        Returns:
            Bytes, or numpy arrays in C order, by name. A name such as "pixel_values:bfloat16" gives a dtype that numpy
            lacks; its array is a view of the same width.

        Raises:
            RowError: The row cannot be prepared. Any other exception becomes `prepare_failed`.
        """
        ...


@runtime_checkable
class Scaling(Preparation, Protocol):
    """A preparation that knows how large it makes an image, so that JPEGs need not be decoded at full size."""

    def resized_size(self, width: int, height: int) -> tuple[int, int] | None:
        """Return the width and height that an image is resized to as a whole, before it is cut into tiles.

        Images with the same resized size become equally many tiles and tokens. Any image that is at least as large in
        both directions will do as the source. None if the size is not known.
        """
        ...
