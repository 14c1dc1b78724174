"""The GPUs that are visible, and their assignment to replicas."""

import pytest

from batchvl.config.options import RunOptions
from batchvl.errors import OptionError
from batchvl.hardware.gpus import Gpu, GpuAssignment, assign_gpus, filter_visible, visible_gpus

ONE, TWO = "GPU-8c5b9f4e-aaaa", "GPU-17d3c5a0-bbbb"


@pytest.fixture
def dev(tmp_path):
    """Return a function that makes a /dev with the given number of GPUs."""

    def make(gpus: int):
        for name in ("nvidiactl", "nvidia-uvm", *(f"nvidia{number}" for number in range(gpus))):
            (tmp_path / name).touch()
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("variable", "names"),
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
        ("0,,1", ["0"]),
    ],
)
def test_visible_gpus_follow_cuda_s_rules(variable, names, dev):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert visible_gpus(environment, dev(4)) == names


def test_no_gpu_is_visible_without_device_files(dev):
    assert visible_gpus({}, dev(0)) == visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, dev(0)) == []


def test_list_and_variable_agree_on_the_same_gpus(dev):
    gpus = [Gpu(number, uuid, "", "", None, None) for number, uuid in enumerate((ONE, TWO))]
    assert filter_visible(gpus, {}) == gpus
    for variable, expected in (
        ("1,0", [1, 0]),
        (f"{TWO}", [1]),
        ("0,-1,1", [0]),
        ("0,,1", [0]),
        ("1,1", [1]),
        ("2", []),
    ):
        visible = filter_visible(gpus, {"CUDA_VISIBLE_DEVICES": variable})
        assert [gpu.index for gpu in visible] == expected


def assign(dev, variable=None, **options):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    found = RunOptions.of(**{"engine": "lmdeploy", **options})
    per_replica = 0 if found.engine.engine == "fake" else found.lmdeploy.tp
    return assign_gpus(found, per_replica, environment, dev)


def visible(assignments):
    return [assignment.environment["CUDA_VISIBLE_DEVICES"] for assignment in assignments]


def test_a_single_replica_is_not_restricted(dev):
    here = dev(4)
    assert assign(here) == assign(here, gpus=1, tp=2) == assign(here, device="cuda:3") == [GpuAssignment()]
    assert assign(here, "2", gpus="all") == [GpuAssignment()]
    assert assign(here, gpus="all", tp=3) == [GpuAssignment()]


def test_each_replica_gets_its_own_gpus(dev):
    here = dev(4)
    assert visible(assign(here, gpus=3)) == ["0", "1", "2"]
    assert visible(assign(here, gpus="all")) == ["0", "1", "2", "3"]
    assert visible(assign(here, gpus="all", tp=2)) == ["0,1", "2,3"]
    assert visible(assign(here, f"3,{ONE},{TWO}", gpus=2)) == ["3", ONE]
    assert visible(assign(here, gpus=2, engine="transformers", device="cuda")) == ["0", "1"]
    first, second = assign(here, gpus=4, tp=2)
    assert (str(first), first.tag, str(second), second.tag) == ("GPUs 0, 1", "gpu0-1", "GPUs 2, 3", "gpu2-3")
    assert [str(assignment) for assignment in assign(here, f"{TWO},{ONE}", gpus=2)] == ["GPU 0", "GPU 1"]


def test_the_fake_engine_needs_no_gpu(dev):
    assert [assignment.tag for assignment in assign(dev(0), engine="fake", gpus=3)] == ["gpu0", "gpu1", "gpu2"]
    assert len(assign(dev(0), engine="fake", gpus="all")) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 5}, "--gpus 5: found 4 GPUs here"),
        ({"gpus": 3, "variable": "1,2"}, "--gpus 3: found 2 GPUs here (CUDA_VISIBLE_DEVICES=1,2)"),
        ({"gpus": "all", "variable": ""}, "--gpus all: found no NVIDIA GPU here"),
        ({"gpus": "all", "tp": 8}, "--gpus all: found 4 GPUs here"),
        ({"gpus": 3, "tp": 2}, "--gpus 3: must be a multiple of 2, the GPUs of each replica"),
        ({"gpus": 2, "device": "cuda:1"}, "--gpus 2: conflicts with --device cuda:1"),
        ({"gpus": "all", "device": "cpu"}, "--gpus all: conflicts with --device cpu"),
        ({"gpus": 2, "device": "cpu", "engine": "fake"}, "--device cpu"),
        ({"gpus": 2, "engine": "transformers", "variable": "-1"}, "--gpus 2: found no NVIDIA GPU"),
        ({"gpus": 0}, "--gpus: expected a number of GPUs (1, 2, …) or 'all'; found 0"),
        ({"gpus": "some"}, "--gpus: expected a number of GPUs (1, 2, …) or 'all'; found 'some'"),
    ],
)
def test_invalid_assignments(options, message, dev):
    with pytest.raises(OptionError) as error:
        assign(dev(4), **options)
    assert message in str(error.value)
