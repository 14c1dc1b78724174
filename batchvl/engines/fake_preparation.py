"""What image workers do for the FakeEngine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..request import Image, Request

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

SIDE = 32


class Thumbnails:
    """Each picture as SIDE x SIDE pixels of three bytes."""

    def prepare(self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()) -> dict[str, bytes]:
        return {f"picture{i}": picture.resize((SIDE, SIDE)).tobytes() for i, picture in enumerate(pictures)}
