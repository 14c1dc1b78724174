"""What LMDeploy makes of a row, on its way from an image worker's process to the engine's."""

from __future__ import annotations

import numpy
import pytest
import torch

from batchvl.ipc.arena import Arena
from batchvl.types import Extent, Request, Tensor

pytestmark = pytest.mark.lmdeploy


def crossed(inputs, salt=0):
    """Inputs after their way through an arena."""
    from batchvl.engines.lmdeploy.inputs import pack, unpack

    arrays, arena, tensors, at = pack(inputs), Arena(16), [], 0
    for key, array in arrays.items():
        name, _, dtype = key.partition(":")
        tensors.append(Tensor(name, dtype or array.dtype.name, array.shape, at))
        arena.at(Extent(at, array.nbytes))[:] = array.tobytes()
        at += -(-array.nbytes // 64) * 64
    return unpack(Request(0, (), extent=Extent(0, at), tensors=tuple(tensors), cache_salt=salt), arena)


def test_all_that_lmdeploy_gives_comes_out_as_it_went_in():
    from lmdeploy.vl.constants import Modality

    pixels = torch.randn(3, 5).to(torch.bfloat16)
    given = {
        "prompt": "ä", "input_ids": list(range(3000)), "multimodal": [
            {"pixel_values": pixels, "offset": (3, 259), "modality": Modality.IMAGE, "fingerprint": b"\x00" * 32},
            {"grid": torch.tensor([[1, 4, 6]]), "mask": numpy.array([True, False]), "image_size": (640, 480)},
            {"none": None, "share": 0.5, "flag": True, "nested": [[1], ["a", (1, (2,))]], "count": numpy.int64(7)},
            {"scalar": torch.tensor(4), "empty": torch.empty(0, 3), "part": torch.arange(12).reshape(3, 4)[:, ::2]},
        ],
    }  # fmt: skip

    found = crossed(given)

    assert (found["prompt"], found["input_ids"]) == (given["prompt"], given["input_ids"])
    for before, after in zip(given["multimodal"], found["multimodal"], strict=True):
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


def test_a_salt_gives_pictures_other_fingerprints_and_nothing_else():
    from batchvl.engines.lmdeploy.inputs import IMAGES

    pictures = [{"offset": number, "fingerprint": bytes([number]) * 32} for number in range(2)] + [{"offset": 2}]
    for key in (IMAGES, "multimodal"):
        found = [crossed({key: pictures, "input_ids": [1]}, salt) for salt in (0, 1, 2, 1)]
        assert found[0] == {key: pictures, "input_ids": [1]}
        assert found[1] == found[3]
        prints = {picture.pop("fingerprint") for each in found[:3] for picture in each[key][:2]}
        assert len(prints) == 6, "one for each picture and salt"
        assert {len(each) for each in prints} == {32}
        assert found[0] == found[1] == found[2]


def test_what_cannot_cross_is_named():
    from batchvl.engines.lmdeploy.inputs import pack

    with pytest.raises(TypeError, match="returned a object, which cannot be sent"):
        pack({"multimodal": [{"what": object()}]})
