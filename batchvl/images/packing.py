"""Where a job's arrays come to lie in its extent of the arena."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..types import Tensor
from .preparation import Array

_ALIGNMENT = 64


class ArenaPacker:
    """Arrays one after another, and each once."""

    def __init__(self) -> None:
        self.size = 0
        """Bytes that they take."""
        self._places: dict[tuple[int, int] | int, int] = {}
        self._arrays: list[tuple[Array, int]] = []

    def add(self, arrays: Mapping[str, Array]) -> tuple[Tensor, ...]:
        """One row's arrays, some of which may be other rows' as well."""
        tensors = []
        for key, array in arrays.items():
            name, _, dtype = key.partition(":")
            at = self._place(array)
            if isinstance(array, bytes):
                tensors.append(Tensor(name, "uint8", (len(array),), at))
            else:
                tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, at))
        return tuple(tensors)

    def write(self, into: memoryview) -> None:
        """Copies all of them to the extent's bytes."""
        for array, at in self._arrays:
            if size := _size(array):
                data: Any = array  # numpy's arrays are buffers from Python 3.12 on, as far as types tell
                into[at : at + size] = memoryview(data).cast("B")

    def _place(self, array: Array) -> int:
        # Two arrays that live at the same place in memory are one; all of a job's live until they are written.
        key = id(array) if isinstance(array, bytes) else (array.ctypes.data, array.nbytes)
        if (at := self._places.get(key)) is None:
            at = self._places[key] = self.size
            self._arrays.append((array, at))
            self.size += -(-_size(array) // _ALIGNMENT) * _ALIGNMENT
        return at


def _size(array: Array) -> int:
    return len(array) if isinstance(array, bytes) else array.nbytes
