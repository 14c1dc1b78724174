"""Which GPUs each replica sees, and what cannot be asked for."""

import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import OptionError
from batchvl.hardware.gpus import GpuAssignment, assign_gpus, visible_gpus

ONE, TWO = "GPU-8c5b9f4e-aaaa", "GPU-17d3c5a0-bbbb"


@pytest.fixture
def dev(tmp_path):
    """A /dev with so many GPUs."""

    def make(gpus: int):
        for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(gpus))):
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("told", "names"),
    [
        (None, ["0", "1", "2", "3"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", ["2", "0"]),
        (" 1 , 3 ", ["1", "3"]),
        ("0,-1,2", ["0"]),
        ("0,4,1", ["0"]),
        (f"{ONE},{TWO}", [ONE, TWO]),
        ("MIG-1f4a", ["MIG-1f4a"]),
    ],
)
def test_visible_gpus_are_cudas(told, names, dev):
    environment = {} if told is None else {"CUDA_VISIBLE_DEVICES": told}
    assert visible_gpus(environment, dev(4)) == names


def test_without_devices_there_are_none(dev):
    assert visible_gpus({}, dev(0)) == visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, dev(0)) == []


def asked(dev, told=None, **options):
    environment = {} if told is None else {"CUDA_VISIBLE_DEVICES": told}
    return assign_gpus(RunOptions.of(**{"engine": "lmdeploy", **options}), environment, dev)


def seen(found):
    return [place.environment["CUDA_VISIBLE_DEVICES"] for place in found]


def test_one_sees_what_there_is(dev):
    here = dev(4)
    assert asked(here) == asked(here, gpus=1, tp=2) == asked(here, device="cuda:3") == [GpuAssignment()]
    assert asked(here, "2", gpus="all") == [GpuAssignment()]
    assert asked(here, gpus="all", tp=3) == [GpuAssignment()]


def test_each_has_a_gpu_or_a_group_of_its_own(dev):
    here = dev(4)
    assert seen(asked(here, gpus=3)) == ["0", "1", "2"]
    assert seen(asked(here, gpus="all")) == ["0", "1", "2", "3"]
    assert seen(asked(here, gpus="all", tp=2)) == ["0,1", "2,3"]
    assert seen(asked(here, f"3,{ONE},{TWO}", gpus=2)) == ["3", ONE]
    assert seen(asked(here, gpus=2, engine="transformers", device="cuda")) == ["0", "1"]
    first, second = asked(here, gpus=4, tp=2)
    assert (str(first), first.tag, str(second), second.tag) == ("GPUs 0, 1", "gpu0-1", "GPUs 2, 3", "gpu2-3")
    assert [str(place) for place in asked(here, f"{TWO},{ONE}", gpus=2)] == ["GPU 0", "GPU 1"]


def test_the_fake_engine_needs_no_gpu(dev):
    assert [place.tag for place in asked(dev(0), engine="fake", gpus=3)] == ["gpu0", "gpu1", "gpu2"]
    assert len(asked(dev(0), engine="fake", gpus="all")) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 5}, "--gpus 5: found 4 GPUs here"),
        ({"gpus": 3, "told": "1,2"}, "--gpus 3: found 2 GPUs here (CUDA_VISIBLE_DEVICES=1,2)"),
        ({"gpus": "all", "told": ""}, "--gpus all: found no NVIDIA GPU here"),
        ({"gpus": "all", "tp": 8}, "--gpus all: found 4 GPUs here"),
        ({"gpus": 3, "tp": 2}, "--gpus 3: is no multiple of --tp 2"),
        ({"gpus": 2, "device": "cuda:1"}, "--gpus 2: --device cuda:1 names one device"),
        ({"gpus": "all", "device": "cpu"}, "--gpus all: --device cpu names one device"),
        ({"gpus": 2, "device": "cpu", "engine": "fake"}, "--device cpu"),
        ({"gpus": 2, "engine": "transformers", "told": "-1"}, "--gpus 2: found no NVIDIA GPU"),
        ({"gpus": 0}, "--gpus: 0 is no number of GPUs: want 1, 2, … or all"),
        ({"gpus": "some"}, "--gpus: 'some' is no number of GPUs"),
    ],
)
def test_what_cannot_be(options, words, dev):
    with pytest.raises(OptionError) as refused:
        asked(dev(4), **options)
    assert words in str(refused.value)
