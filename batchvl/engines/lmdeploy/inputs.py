"""What LMDeploy makes of a row, as arrays that cross the arena, and back again without a copy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from lmdeploy.vl.constants import Modality
from msgspec.msgpack import Ext, decode, encode

from ...ipc.arena import ArenaView
from ...types import Request, Tensor

NAME = "inputs"
"""The array that holds all but the tensors, as msgpack. Behind it are the tensors, in the order of their numbers."""
PICTURES = "pictures"
"""What a row of several turns has instead of LMDeploy's inputs: the part of each picture, in the order of the turns."""

_TENSOR, _ARRAY, _TUPLE, _MODALITY = range(1, 5)
"""Codes of msgpack's extension types: a tensor or numpy's array by its number, a tuple, one of LMDeploy's modalities"""


def pack(inputs: Mapping[str, Any]) -> dict[str, numpy.ndarray]:
    """Named arrays of what LMDeploy's preparation gives: text, numbers and tensors in dicts, lists and tuples.

    Raises TypeError for anything else.
    """
    tensors: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
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
            case Mapping():  # transformers' BatchFeature is one, and no dict
                return {key: plain(item) for key, item in value.items()}
            case tuple():
                return Ext(_TUPLE, encode([plain(item) for item in value]))
            case list() if all(type(item) is int for item in value):  # a prompt's tokens are thousands
                return value
            case list():
                return [plain(item) for item in value]
        raise TypeError(f"LMDeploy's preparation gave a {type(value).__name__}, which does not cross processes")

    body = numpy.frombuffer(encode(plain(inputs)), numpy.uint8)
    return {NAME: body} | {f"{number}:{_dtype(tensor)}": _view(tensor) for number, tensor in enumerate(tensors)}


def unpack(request: Request, arena: ArenaView) -> dict[str, Any]:
    """What was packed. Its tensors are the arena's own memory: they hold until the request's extent is released.
    Its pictures' fingerprints are other ones for each salt.
    """
    assert request.extent is not None
    memory = arena.at(request.extent)
    body, *rest = request.tensors
    tensors = [_tensor(memory, tensor) for tensor in rest]

    def special(code: int, data: memoryview) -> Any:
        if code == _TUPLE:
            return tuple(decode(data, ext_hook=special))
        if code == _MODALITY:
            return Modality(bytes(data).decode())
        tensor = tensors[int.from_bytes(data, "little")]
        return tensor.numpy() if code == _ARRAY else tensor

    inputs: dict[str, Any] = decode(memory[body.offset : body.offset + body.shape[0]], ext_hook=special)
    if request.cache_salt:
        for picture in inputs.get(PICTURES) or inputs.get("multimodal") or ():
            if (own := picture.get("fingerprint")) is not None:
                picture["fingerprint"] = hashlib.sha256(own + request.cache_salt.to_bytes(8, "little")).digest()
    return inputs


def is_packed(request: Request) -> bool:
    """Whether a request's arrays are `pack`'s."""
    return bool(request.tensors) and request.tensors[0].name == NAME


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _view(tensor: torch.Tensor) -> numpy.ndarray:
    tensor = tensor.detach().contiguous()
    found: numpy.ndarray = (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return found


def _tensor(memory: memoryview, where: Tensor) -> torch.Tensor:
    dtype = getattr(torch, where.dtype)
    if not (count := math.prod(where.shape)):
        return torch.empty(where.shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=where.offset).reshape(where.shape)
