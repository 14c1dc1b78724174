"""The layout of a job's arrays in its extent of the arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Tensor
from .preparation import Array

_ALIGNMENT = 64


class ArenaPacker:
    """Lays out arrays one after another. An array that several rows share is stored once.

    All arrays must live until `write`: their addresses identify them.
    """

    def __init__(self) -> None:
        self.size = 0
        """Bytes of all arrays so far."""
        self._offsets: dict[tuple[int, int] | int, int] = {}
        self._arrays: list[tuple[Array, int]] = []

    def add(self, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """Add one row's arrays and return where they will be. Names are those of `Preparation.prepare`."""
        tensors = []
        for key, array in arrays.items():
            name, _, dtype = key.partition(":")
            offset = self._offset(array)
            if isinstance(array, bytes):
                tensors.append(Tensor(name, "uint8", (len(array),), offset))
            else:
                tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, offset))
        return tuple(tensors)

    def write(self, view: memoryview) -> None:
        """Copy all arrays into the bytes of an extent of at least `size` bytes."""
        for array, offset in self._arrays:
            if size := _size(array):
                data: Any = array  # numpy arrays are typed as buffers only from Python 3.12 on
                view[offset : offset + size] = memoryview(data).cast("B")

    def _offset(self, array: Array) -> int:
        key = id(array) if isinstance(array, bytes) else (array.ctypes.data, array.nbytes)
        if (offset := self._offsets.get(key)) is None:
            offset = self._offsets[key] = self.size
            self._arrays.append((array, offset))
            self.size += -(-_size(array) // _ALIGNMENT) * _ALIGNMENT
        return offset


def _size(array: Array) -> int:
    return len(array) if isinstance(array, bytes) else array.nbytes
