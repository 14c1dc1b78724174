"""What an engine has image workers do: the seam between `engines/` and `images/workers.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import msgspec

from ..types import Image, Request, Struct

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image as Picture


class PreparationSpec(Struct, frozen=True):
    """How image workers make an engine's inputs; crosses process borders, so it names code instead of holding it."""

    factory: str
    """ "package.module:callable", called once in the workers' host process with `options` as keywords."""
    options: dict[str, Any] = msgspec.field(default_factory=dict)
    text_too: bool = False
    """Whether rows without pictures go through the workers as well, to be tokenised."""
    special_tokens: tuple[str, ...] = ()
    """The tokenizer's own: in a row's values they are escaped or refused."""


Array: TypeAlias = "bytes | numpy.ndarray"


class Preparation(Protocol):
    """Makes one row's inputs from its pictures. Lives in the image workers; loaded before they fork."""

    def prepare(
        self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()
    ) -> Mapping[str, Array]:
        """Named arrays for the engine: bytes, or numpy arrays in C order. A name such as "pixel_values:bfloat16"
        tells a type that numpy lacks; its array is a view of the same width.

        `pictures` are RGB, in the row's order, EXIF orientation applied; `images` tell of the files that they were.
        For several requests about the same pictures it is called with the same list, one after another: what is made
        of them alone may be kept until another list comes, and lies in the arena once.
        Raises a `RowError`; any other exception becomes `prepare_failed`.
        """
        ...


@runtime_checkable
class Scaling(Preparation, Protocol):
    """A preparation that can tell how large it makes a picture. What it does not need is not decoded (`draft.py`)."""

    def used(self, width: int, height: int) -> tuple[int, int] | None:
        """The width and height that a picture of this size is scaled to, the whole of it, before it is cut into tiles:
        it can be had from any picture that is as large in both directions. Pictures for which this is the same become
        equally many tiles and tokens. None where it is not known.
        """
        ...
