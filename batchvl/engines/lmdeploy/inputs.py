"""LMDeploy's inputs of a row: as arrays for the arena, back again without a copy, and the memory that they take."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from lmdeploy.vl.constants import Modality
from msgspec.msgpack import Ext, decode, encode

from ...concurrency import ByteSemaphore
from ...ipc.arena import ArenaView
from ...types import Request, Tensor

NAME = "inputs"
"""Name of the array with everything but the tensors, as msgpack. The tensors follow it, in order of their numbers."""
IMAGES = "images"
"""Only key of a row of several turns, instead of LMDeploy's inputs: what was made of each image, in order."""

_TENSOR, _ARRAY, _TUPLE, _MODALITY = range(1, 5)
"""Codes of msgpack's extension types: a tensor or numpy array by its number, a tuple, one of LMDeploy's modalities."""


def pack(inputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    """Convert what LMDeploy's preparation returns (dicts, lists, tuples, text, numbers and tensors) to named arrays.

    Raises:
        TypeError: A value is of another type.
    """
    tensors: list[torch.Tensor] = []

    def replace_tensors(value: Any) -> Any:
        match value:
            case None | bool() | int() | float() | str() | bytes():
                return value
            case torch.Tensor() | numpy.ndarray():
                tensors.append(torch.as_tensor(value))
                code = _TENSOR if isinstance(value, torch.Tensor) else _ARRAY
                return Ext(code, (len(tensors) - 1).to_bytes(2, "little"))
            case numpy.generic():
                return value.item()
            case Modality():
                return Ext(_MODALITY, value.value.encode())
            case Mapping():  # such as the BatchFeature of transformers, which is not a dict
                return {key: replace_tensors(item) for key, item in value.items()}
            case tuple():
                return Ext(_TUPLE, encode([replace_tensors(item) for item in value]))
            case list() if all(type(item) is int for item in value):  # a prompt has thousands of tokens
                return value
            case list():
                return [replace_tensors(item) for item in value]
        raise TypeError(f"LMDeploy's preparation returned a {type(value).__name__}, which cannot be sent to the engine")

    body = numpy.frombuffer(encode(replace_tensors(inputs)), numpy.uint8)
    return {NAME: body} | {f"{number}:{_dtype(tensor)}": _as_array(tensor) for number, tensor in enumerate(tensors)}


def unpack(request: Request, arena: ArenaView) -> dict[str, Any]:
    """Return what was packed. Its tensors are views of the arena, valid until the request's extent is released.

    The fingerprints of the request's images are changed by its salt.

    Raises:
        ValueError: The request has no extent.
    """
    if request.extent is None:
        raise ValueError(f"row {request.row} has tensors but no extent in the arena")
    memory = arena.at(request.extent)
    body, *rest = request.tensors
    tensors = [_as_tensor(memory, tensor) for tensor in rest]

    def restore(code: int, data: memoryview) -> Any:
        if code == _TUPLE:
            return tuple(decode(data, ext_hook=restore))
        if code == _MODALITY:
            return Modality(bytes(data).decode())
        tensor = tensors[int.from_bytes(data, "little")]
        return tensor.numpy() if code == _ARRAY else tensor

    inputs: dict[str, Any] = decode(memory[body.offset : body.offset + body.shape[0]], ext_hook=restore)
    if request.cache_salt:
        salt = request.cache_salt.to_bytes(8, "little")
        for image in inputs.get(IMAGES) or inputs.get("multimodal") or ():
            if (fingerprint := image.get("fingerprint")) is not None:
                image["fingerprint"] = hashlib.sha256(fingerprint + salt).digest()
    return inputs


def is_packed(request: Request) -> bool:
    """Return whether a request's arrays were made by `pack`."""
    return bool(request.tensors) and request.tensors[0].name == NAME


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _as_array(tensor: torch.Tensor) -> numpy.ndarray:
    tensor = tensor.detach().contiguous()
    array: numpy.ndarray = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _as_tensor(memory: memoryview, where: Tensor) -> torch.Tensor:
    dtype = getattr(torch, where.dtype)
    if not (count := math.prod(where.shape)):
        return torch.empty(where.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=where.offset).reshape(where.shape)


class TileBudget:
    """A limit on the memory of the tiles that LMDeploy itself makes of images, from a row's preparation to its answer.

    For use on one event loop.

    Args:
        size: Bytes in total.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        """Bytes that rows have acquired."""
        self.image_bytes = 16 * 2**20
        """Bytes that an image is assumed to take: the largest so far; at first 13 tiles of InternVL in 16 bits."""
        self._memory = ByteSemaphore(size)
        self._measured = False

    async def acquire(self, images: int) -> int:
        """Wait until there is memory for a number of images. Returns its bytes, to be released."""
        amount = images * self.image_bytes
        await self._memory.acquire(amount)
        self.held += amount
        return amount

    def settle(self, acquired: int, prepared: Any) -> int:
        """Release what a prepared request does not need of the bytes acquired for it. Returns the bytes still held."""
        sizes = [_tensor_bytes(item) for item in prepared.inputs.get("multimodal") or []]
        if largest := max(sizes, default=0):
            self.image_bytes = max(largest, self.image_bytes) if self._measured else largest
            self._measured = True
        needed = min(sum(sizes), acquired)
        self.release(acquired - needed)
        return needed

    def release(self, amount: int) -> None:
        """Return bytes that `acquire` took."""
        self.held -= amount
        self._memory.release(amount)


def _tensor_bytes(item: Any) -> int:
    values = item.values() if isinstance(item, Mapping) else ()  # a Mapping, such as transformers' BatchFeature
    return sum(int(value.nbytes) for value in values if hasattr(value, "nbytes"))
