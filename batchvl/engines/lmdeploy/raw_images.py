"""What image workers do for LMDeploy: decoded pictures as they are, since it makes its own tiles of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy
from PIL import Image as pil

from ...ipc.arena import ArenaView
from ...types import Image, Request

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


class Pictures:
    """Each picture as an array (height, width, 3) of bytes."""

    def prepare(
        self, request: Request, pictures: Sequence[Picture], images: Sequence[Image] = ()
    ) -> dict[str, numpy.ndarray]:
        return {f"picture{number}": numpy.asarray(picture) for number, picture in enumerate(pictures)}


def read(request: Request, number: int, arena: ArenaView) -> Picture:
    """The request's picture with this number, from 0, copied out of the arena."""
    assert request.extent is not None
    tensor = request.tensors[number]
    height, width, channels = tensor.shape
    data = arena.at(request.extent)[tensor.offset : tensor.offset + height * width * channels]
    return pil.frombytes("RGB", (width, height), data)
