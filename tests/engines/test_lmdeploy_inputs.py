"""LMDeploy's inputs of a row on their way from an image worker's process to the engine's."""

from __future__ import annotations

import numpy
import pytest
import torch

from batchvl.ipc.arena import Arena
from batchvl.types import Extent, Request, Tensor

pytestmark = pytest.mark.lmdeploy


def round_trip(inputs, salt=0):
    """Return inputs that were packed into an arena and unpacked."""
    from batchvl.engines.lmdeploy.inputs import pack, unpack

    arrays, arena, tensors, offset = pack(inputs), Arena(16), [], 0
    for key, array in arrays.items():
        name, _, dtype = key.partition(":")
        tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, offset))
        arena.at(Extent(offset, array.nbytes))[:] = array.tobytes()
        offset += -(-array.nbytes // 64) * 64
    return unpack(Request(0, (), extent=Extent(0, offset), tensors=tuple(tensors), cache_salt=salt), arena)


def test_every_type_that_lmdeploy_returns_survives():
    from lmdeploy.vl.constants import Modality

    pixels = torch.randn(3, 5).to(torch.bfloat16)
    inputs = {
        "prompt": "ä",
        "input_ids": list(range(3000)),
        "multimodal": [
            {"pixel_values": pixels, "offset": (3, 259), "modality": Modality.IMAGE, "fingerprint": b"\x00" * 32},
            {"grid": torch.tensor([[1, 4, 6]]), "mask": numpy.array([True, False]), "image_size": (640, 480)},
            {"none": None, "share": 0.5, "flag": True, "nested": [[1], ["a", (1, (2,))]], "count": numpy.int64(7)},
            {"scalar": torch.tensor(4), "empty": torch.empty(0, 3), "part": torch.arange(12).reshape(3, 4)[:, ::2]},
        ],
    }

    restored = round_trip(inputs)

    assert (restored["prompt"], restored["input_ids"]) == (inputs["prompt"], inputs["input_ids"])
    for before, after in zip(inputs["multimodal"], restored["multimodal"], strict=True):
        assert before.keys() == after.keys()
        for key, value in before.items():
            if isinstance(value, torch.Tensor):
                assert (after[key].dtype, after[key].shape) == (value.dtype, value.shape)
                assert torch.equal(after[key], value)
            elif isinstance(value, numpy.ndarray):
                assert isinstance(after[key], numpy.ndarray)
                assert numpy.array_equal(after[key], value)
            else:
                assert (type(after[key]), after[key]) == (int if key == "count" else type(value), value)


def test_a_salt_changes_the_fingerprints_of_images_and_nothing_else():
    from batchvl.engines.lmdeploy.inputs import IMAGES

    images = [{"offset": number, "fingerprint": bytes([number]) * 32} for number in range(2)] + [{"offset": 2}]
    for key in (IMAGES, "multimodal"):
        plain, first, second, repeated = (round_trip({key: images, "input_ids": [1]}, salt) for salt in (0, 1, 2, 1))
        assert plain == {key: images, "input_ids": [1]}
        assert first == repeated
        fingerprints = {image.pop("fingerprint") for each in (plain, first, second) for image in each[key][:2]}
        assert len(fingerprints) == 6, "one for each image and salt"
        assert {len(each) for each in fingerprints} == {32}
        assert plain == first == second


def test_an_unknown_type_is_named():
    from batchvl.engines.lmdeploy.inputs import pack

    with pytest.raises(TypeError, match="returned a object, which cannot be sent"):
        pack({"multimodal": [{"what": object()}]})


def test_a_request_with_tensors_and_no_extent_is_refused():
    """It comes from another process, so the check must also hold with `python -O`."""
    from batchvl.engines.lmdeploy.inputs import unpack

    arena = Arena(1)
    with pytest.raises(ValueError, match="row 7 has tensors but no extent"):
        unpack(Request(7, (), tensors=(Tensor("inputs", "uint8", (1,), 0),)), arena)
    arena.close()
