"""benchmarks/gpu.py: its images, its server, its measurements and, with LMDeploy, everything but the GPU."""

import doctest
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from io import BytesIO
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image

from benchmarks import gpu, meter, scenarios
from benchmarks.image_server import ImageServer
from benchmarks.images import numbered, photographs
from benchmarks.measure import Result, child_environment, killed_after, option_flags, option_values
from benchmarks.meter import Meter
from benchmarks.scenarios import LARGE, QUESTIONS, SCENARIOS, SMALL

from .hardware.driver import install_driver

ROOT = Path(__file__).parents[1]


# -------------------------------------------------------------------------------------------------------------- images


def test_images_have_the_file_sizes_of_photographs():
    for size, smallest, largest in ((SMALL, 60_000, 100_000), (LARGE, 200_000, 400_000)):
        assert all(smallest < len(jpeg) < largest for jpeg in photographs(size, 4))


def test_photographs_differ_in_pixels_and_numbered_images_only_in_bytes():
    jpegs = photographs((160, 120), 12)
    assert len({decoded(jpeg) for jpeg in jpegs}) == 12
    images = [numbered(jpegs, number) for number in range(36)]
    assert len(set(images)) == 36
    assert [decoded(image) for image in images] == [decoded(jpeg) for jpeg in jpegs] * 3


def decoded(jpeg):
    with Image.open(BytesIO(jpeg)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        return image.tobytes()


@pytest.fixture
def server(tmp_path):
    for number, jpeg in enumerate(photographs((160, 120), 3)):
        (tmp_path / f"{number:05}.jpg").write_bytes(jpeg)
    with ImageServer(tmp_path) as running:
        yield running


def test_the_server_has_any_number_of_images(server, tmp_path):
    jpegs = [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    for number in (0, 1, 2, 3, 1000, 999_999_999):
        with urllib.request.urlopen(server.url(number)) as response:
            assert response.headers["Content-Type"] == "image/jpeg"
            assert response.read() == numbered(jpegs, number)
    with pytest.raises(urllib.error.HTTPError, match="404") as error:
        urllib.request.urlopen(server.url(0).replace("0.jpg", "x.jpg"))
    error.value.close()


async def test_concurrent_requests_over_persistent_connections_get_the_right_images(server, tmp_path):
    import asyncio

    import aiohttp

    jpegs = [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as session:

        async def is_right(number):
            async with session.get(server.url(number)) as response:
                return await response.read() == numbered(jpegs, number)

        assert all(await asyncio.gather(*map(is_right, range(200))))


# ----------------------------------------------------------------------------------------------------------- scenarios


def test_answers_have_16_to_128_tokens_and_72_on_average():
    lengths = [row.tokens for row in SCENARIOS["2b-1tile"][0].make_rows(113 * 8)]
    assert (min(lengths), max(lengths), fmean(lengths)) == (16, 128, 72)
    assert set(Counter(lengths).values()) == {8}
    assert abs(fmean(lengths[:32]) - 72) < 8, "a batch of 32 is no easier than another"


def test_all_questions_about_an_image_are_consecutive():
    [not_cached, cached] = SCENARIOS["2b-questions"]
    rows = gpu.make_rows(not_cached, "run", 25)
    assert [(row.image, row.question) for row in rows] == [(0, n) for n in range(10)] + [(1, n) for n in range(10)]
    assert len(QUESTIONS) == 10
    assert (not_cached.options, cached.options) == ((("engine_option", "enable_prefix_caching=false"),), ())
    assert cached.distinct_pixels


def test_rows_are_per_gpu_and_the_loop_has_fewer_in_proportion():
    [_, two, _] = SCENARIOS["2b-1tile-gpus"]
    assert len(gpu.make_rows(two, "ceiling", 800)) == len(gpu.make_rows(two, "run", 800)) == 1600
    assert len(gpu.make_rows(two, "loop", 800)) == 256
    assert len(gpu.make_rows(two, "run", None)) == 16_000


def test_options_are_passed_to_the_command_and_to_the_library():
    arguments = ["image-workers=12", "engine_option=max_batch_size=512", "engine_option=a=1", "trust-remote-code"]
    options = [gpu.parse_option(option) for option in arguments]
    flags = "--image-workers 12 --engine-option max_batch_size=512 --engine-option a=1 --trust-remote-code"
    assert option_flags(options) == flags.split()
    several = ["max_batch_size=512", "a=1"]
    assert option_values(options) == {"image_workers": "12", "engine_option": several, "trust_remote_code": "true"}
    gpu.check_options("turbomind", options)
    with pytest.raises(ValueError, match="no option 'image_worker'"):
        gpu.check_options("turbomind", [("image_worker", "1")])
    assert [doctest.testmod(module).failed for module in (gpu, scenarios)] == [0, 0]


def test_measured_processes_do_not_see_options_in_the_environment(monkeypatch):
    monkeypatch.setenv("BATCHVL_MODEL", "shapes")
    environment = child_environment(["1", "3"])
    assert "BATCHVL_MODEL" not in environment
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3"


# ----------------------------------------------------------------------------------------------------------- measuring


def fake_nvidia_smi(directory, monkeypatch):
    """Put an nvidia-smi with one busy GPU on the PATH."""
    directory.mkdir()
    smi = directory / "nvidia-smi"
    smi.write_text('#!/bin/sh\ncase "$*" in\n*utilization*) echo "90, 1024" ;;\nesac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


BUSY = "import time; memory = bytearray(64 * 2**20); end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def test_the_usage_of_a_process_tree_is_measured(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(meter, "SECONDS", 0.1)
    monkeypatch.setattr(meter, "MEMORY_SECONDS", 0.1)
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"
    with subprocess.Popen([sys.executable, "-c", parent]) as root, Meter([root.pid], ["0"]) as running:
        time.sleep(0.5)
        begin = time.monotonic()
        time.sleep(2)
        end = time.monotonic()
        for process in reversed(meter.tree([root.pid])):
            process.kill()
    usage = running.usage(begin, end)
    assert usage.cores is not None
    assert 0.01 < usage.cores < 1.3, "one core, or what other load leaves of it"
    assert usage.host_bytes is not None
    assert 64 * 2**20 < usage.host_bytes < 256 * 2**20
    assert (usage.gpu_busy, usage.gpu_bytes) == (pytest.approx(0.9), 2**30)
    assert running.usage(end + 10, end + 20) == meter.Usage(None, None, None, None)


def test_without_nvidia_smi_processes_are_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(meter, "SECONDS", 0.05)
    with Meter([os.getpid()], ["0"]) as running:
        time.sleep(0.5)
    usage = running.usage(0, time.monotonic())
    assert usage.cores is not None
    assert (usage.gpu_busy, usage.gpu_bytes) == (None, None)


def test_a_process_that_takes_too_long_is_killed(capsys):
    began, command = time.monotonic(), [sys.executable, "-c", "import time; time.sleep(60)"]
    with killed_after(subprocess.Popen(command, stdout=subprocess.PIPE), 0.2) as process:
        assert process.stdout.readline() == b""
    assert time.monotonic() - began < 30
    assert "longer than 0.2 s" in capsys.readouterr().err


def result(system, rate, **more):
    values = {
        "scenario": "2b-13tiles",
        "title": "2B",
        "backend": "turbomind",
        "system": system,
        "rows": 1000,
        "seconds": 1000 / rate,
        "start_seconds": 14.0,
        "input_tokens": 3_369_000,
        "output_tokens": 72_000,
        "wrong": 0,
        "cores": 1.25,
        "host_bytes": 3 * 2**30,
        "gpu_busy": 0.98,
        "gpu_bytes": 100 * 2**30,
    }
    return Result(**values | more)


def test_the_table_is_markdown_even_if_results_are_missing():
    results = [result("ceiling", 20.0), result("loop", 5.9, gpu_busy=None), result("run", 19.5, gpu_wait=0.004)]
    lines = gpu.table(results).splitlines()
    assert "| 2B, turbomind | 20.0 | 5.9 | 19.5 | 97.5% |" in lines
    assert "| 2B, turbomind | run | 19.5 | 1,000 | 51.3 | 98% | 1.2 | 3.0 GiB | 100.0 GiB | 0.4% |" in lines
    assert "| 2B, turbomind | loop | 5.9 | 1,000 | 169.5 |  | 1.2 | 3.0 GiB | 100.0 GiB |  |" in lines
    assert "| 2B, turbomind | 20.0 |  |  |  |" in gpu.table(results[:1])
    assert len({line.count("|") for line in lines if line}) == 2


def test_results_that_cannot_be_compared_are_reported():
    assert gpu.find_faults([result("ceiling", 20), result("run", 19)]) == []
    [wrong_length, other_prompts] = gpu.find_faults(
        [result("ceiling", 20), result("run", 19, wrong=3, input_tokens=3_368_000)]
    )
    assert wrong_length == "2b-13tiles, run: 3 of 1000 answers have the wrong length"
    assert "ceiling 3369.00, run 3368.00" in other_prompts


@pytest.mark.parametrize("missing", ["lmdeploy", "gpu"])
def test_missing_requirements_are_reported(monkeypatch, capsys, tmp_path, missing):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tiny"])
    monkeypatch.setattr(gpu, "find_spec", lambda _: None if missing == "lmdeploy" else object())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert ("needs LMDeploy" if missing == "lmdeploy" else "needs an NVIDIA GPU: no NVIDIA driver") in error


# ------------------------------------------------------------------------------------------- everything but the GPU


def without_gpu(tmp_path, monkeypatch, **behaviour):
    """Let the CPU core of LMDeploy's tests do the GPU's work in all processes that use LMDeploy."""
    from tests.engines import cpu_core

    fake_nvidia_smi(tmp_path / "bin", monkeypatch)
    install_driver(tmp_path / "driver", monkeypatch, "gpu GPU-0 1000 900 -1 no GPU")
    core = cpu_core.with_cpu_core(tmp_path / "core", whole=True, **behaviour)
    (tmp_path / "core" / "sitecustomize.py").write_text(
        "import sys\n"
        "if {'batchvl.serving.engine_main', 'benchmarks.baseline'} & set(sys.orig_argv):\n"
        "    from tests.engines import cpu_core\n"
        "    cpu_core.install()\n"
    )
    for name in ("PYTHONPATH", cpu_core.VARIABLE):
        monkeypatch.setenv(name, core[name])


def command(tmp_path, *arguments):
    options = ["--backend", "pytorch", "--option", "dtype=float16", "--models", str(tmp_path / "models")]
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options, *arguments], capture_output=True, text=True
    )
    return process.returncode, process.stdout, process.stdout + process.stderr


@pytest.mark.lmdeploy
@pytest.mark.timeout(600)
def test_three_systems_give_answers_of_the_same_prescribed_lengths(tmp_path, monkeypatch):
    """The model is the benchmark's own, run by transformers, and would stop at an end token."""
    without_gpu(tmp_path, monkeypatch, answer="model")
    out = tmp_path / "out"

    code, output, full_output = command(tmp_path, "tiny", "--rows", "12", "--out", str(out))

    assert code == 0, full_output
    results = [json.loads(path.read_bytes()) for path in sorted(out.glob("*.json"))]
    counts = [(each["system"], each["rows"], each["wrong"]) for each in results]
    assert counts == [("ceiling", 12, 0), ("loop", 3, 0), ("run", 12, 0)]
    lengths = [row.tokens for row in SCENARIOS["tiny"][0].make_rows(12)]
    assert [each["output_tokens"] for each in results] == [sum(lengths), sum(lengths[:3]), sum(lengths)]
    assert len({each["input_tokens"] / each["rows"] for each in results}) == 1
    assert results[0]["input_tokens"] / 12 > 256
    assert results[0]["gpu_busy"] == pytest.approx(0.9)
    assert results[0]["cores"] > 0.1
    assert results[0]["host_bytes"] > 2**28
    assert results[2]["gpu_wait"] is not None
    assert "| TINY, 640x480, 1 tile, dtype=float16, pytorch |" in output
    assert command(tmp_path, "--out", str(out))[1].splitlines()[2] in output, "the same table from the files"


@pytest.mark.lmdeploy
def test_an_fp8_checkpoint_has_a_scale_for_each_block(tmp_path):
    from safetensors.torch import load_file

    from benchmarks.internvl import make

    whole, small = (
        load_file(make("tiny", tmp_path / str(fp8), max_tiles=1, fp8=fp8) / "model.safetensors")
        for fp8 in (False, True)
    )
    scaled = {name for name in small if name.endswith("_scale_inv")}
    assert len(scaled) == 2 * 7, "four matrices of each layer's attention and three of its feed-forward half"
    assert small.keys() - scaled == whole.keys()
    assert all("language_model" in name for name in scaled)
    for name, tensor in whole.items():
        if (scales := small.get(name + "_scale_inv")) is None:
            assert tensor.equal(small[name])
            continue
        assert scales.shape == (tensor.shape[0] // 128, tensor.shape[1] // 128)
        dequantised = small[name].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert (dequantised - tensor).norm() / tensor.norm() < 0.04, "E4M3 has a mantissa of 3 bits"
    config = json.loads((tmp_path / "True" / "config.json").read_text())
    assert config["text_config"]["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.lmdeploy
@pytest.mark.timeout(600)
def test_two_gpus_share_the_rows_and_failures_are_reported(tmp_path, monkeypatch):
    from dataclasses import replace

    from benchmarks.internvl import make
    from benchmarks.measure import Bench, MeasurementFailed

    without_gpu(tmp_path, monkeypatch, answer="text", text="x" * 200)
    model, [tiny] = make("tiny", tmp_path / "model", max_tiles=1), SCENARIOS["tiny"]
    options = [("dtype", "float16")]
    bench = Bench(replace(tiny, gpus=2), model, "pytorch", options, ["0", "1"], tmp_path / "two", 300)
    measured = bench.measure("ceiling", tiny.make_rows(21))
    assert (measured.rows, measured.wrong) == (21, 0)
    jobs = [json.loads(path.read_bytes()) for path in sorted((tmp_path / "two" / "ceiling").glob("job-*.json"))]
    assert [len(job["rows"]) for job in jobs] == [11, 10]
    assert measured.output_tokens == sum(row.tokens for row in tiny.make_rows(21))

    bench = Bench(tiny, tmp_path / "nothing", "pytorch", options, ["0"], tmp_path / "failing", 300)
    for system in ("ceiling", "run"):
        with pytest.raises(MeasurementFailed, match="nothing"):
            bench.measure(system, tiny.make_rows(2))
