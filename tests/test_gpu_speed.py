"""benchmarks/gpu.py: its pictures, its server, what it measures by, and, with LMDeploy, all of it but the GPU."""

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
from benchmarks.measure import Result, ended, environment, flags, values
from benchmarks.meter import Meter
from benchmarks.picture_server import PictureServer
from benchmarks.pictures import numbered, photographs
from benchmarks.scenarios import LARGE, QUESTIONS, SCENARIOS, SMALL

ROOT = Path(__file__).parents[1]


# ------------------------------------------------------------------------------------------------------------ pictures


def test_pictures_have_the_file_sizes_of_photographs():
    for size, least, most in ((SMALL, 60_000, 100_000), (LARGE, 200_000, 400_000)):
        assert all(least < len(jpeg) < most for jpeg in photographs(size, 4))


def test_photographs_differ_in_pixels_and_numbered_ones_in_bytes_alone():
    jpegs = photographs((160, 120), 12)
    assert len({decoded(jpeg) for jpeg in jpegs}) == 12
    pictures = [numbered(jpegs, number) for number in range(36)]
    assert len(set(pictures)) == 36
    assert [decoded(picture) for picture in pictures] == [decoded(jpeg) for jpeg in jpegs] * 3


def decoded(jpeg):
    with Image.open(BytesIO(jpeg)) as picture:
        assert (picture.format, picture.mode) == ("JPEG", "RGB")
        return picture.tobytes()


@pytest.fixture
def server(tmp_path):
    for number, jpeg in enumerate(photographs((160, 120), 3)):
        (tmp_path / f"{number:05}.jpg").write_bytes(jpeg)
    with PictureServer(tmp_path) as found:
        yield found


def test_the_server_has_as_many_pictures_as_are_asked_for(server, tmp_path):
    jpegs = [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    for number in (0, 1, 2, 3, 1000, 999_999_999):
        with urllib.request.urlopen(server.url(number)) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"
            assert answer.read() == numbered(jpegs, number)
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        urllib.request.urlopen(server.url(0).replace("0.jpg", "x.jpg"))
    refused.value.close()


async def test_connections_stay_and_many_at_once_get_what_they_asked_for(server, tmp_path):
    import asyncio

    import aiohttp

    jpegs = [path.read_bytes() for path in sorted(tmp_path.glob("*.jpg"))]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=8)) as session:

        async def right(number):
            async with session.get(server.url(number)) as answer:
                return await answer.read() == numbered(jpegs, number)

        assert all(await asyncio.gather(*map(right, range(200))))


# ----------------------------------------------------------------------------------------------------------- scenarios


def test_answers_have_16_to_128_tokens_and_72_on_average():
    lengths = [row.tokens for row in SCENARIOS["2b-1tile"][0].make_rows(113 * 8)]
    assert (min(lengths), max(lengths), fmean(lengths)) == (16, 128, 72)
    assert set(Counter(lengths).values()) == {8}
    assert abs(fmean(lengths[:32]) - 72) < 8, "a list of 32 is no easier than another"


def test_all_questions_of_a_picture_follow_one_another():
    [plain, cached] = SCENARIOS["2b-questions"]
    rows = gpu.rows_of(plain, "run", 25)
    assert [(row.picture, row.question) for row in rows] == [(0, n) for n in range(10)] + [(1, n) for n in range(10)]
    assert len(QUESTIONS) == 10
    assert (plain.options, cached.options) == ((("engine_option", "enable_prefix_caching=false"),), ())
    assert cached.different


def test_rows_are_a_gpus_and_the_loop_has_its_share():
    [_, two, _] = SCENARIOS["2b-1tile-gpus"]
    assert len(gpu.rows_of(two, "ceiling", 800)) == len(gpu.rows_of(two, "run", 800)) == 1600
    assert len(gpu.rows_of(two, "loop", 800)) == 256
    assert len(gpu.rows_of(two, "run", None)) == 16_000


def test_options_go_to_the_command_and_to_the_library():
    told = ["image-workers=12", "engine_option=max_batch_size=512", "engine_option=a=1", "trust-remote-code"]
    options = [gpu.named(option) for option in told]
    assert flags(options) == [
        "--image-workers", "12", "--engine-option", "max_batch_size=512", "--engine-option", "a=1",
        "--trust-remote-code",
    ]  # fmt: skip
    several = ["max_batch_size=512", "a=1"]
    assert values(options) == {"image_workers": "12", "engine_option": several, "trust_remote_code": "true"}
    gpu.check("turbomind", options)
    with pytest.raises(ValueError, match="no option 'image_worker'"):
        gpu.check("turbomind", [("image_worker", "1")])
    assert [doctest.testmod(module).failed for module in (gpu, scenarios)] == [0, 0]


def test_what_is_measured_sees_no_options_of_the_environment(monkeypatch):
    monkeypatch.setenv("BATCHVL_MODEL", "shapes")
    found = environment(["1", "3"])
    assert "BATCHVL_MODEL" not in found
    assert found["CUDA_VISIBLE_DEVICES"] == "1,3"


# ----------------------------------------------------------------------------------------------------------- measuring


def stand_in(folder, monkeypatch):
    """An nvidia-smi that knows one GPU, which is busy."""
    folder.mkdir()
    smi = folder / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        '*mig.mode*) echo "0, GPU-0, no GPU, 1.0, 1000, 900, [N/A]" ;;\n'
        '*utilization*) echo "90, 1024" ;;\nesac\n'
    )
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


BUSY = "import time; taken = bytearray(64 * 2**20); end = time.monotonic() + 60\nwhile time.monotonic() < end: pass"


def test_a_tree_of_processes_is_measured(tmp_path, monkeypatch):
    stand_in(tmp_path / "bin", monkeypatch)
    monkeypatch.setattr(meter, "SECONDS", 0.1)
    monkeypatch.setattr(meter, "MEMORY_SECONDS", 0.1)
    below = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}])"
    with subprocess.Popen([sys.executable, "-c", below]) as root, Meter([root.pid], ["0"]) as watching:
        time.sleep(0.5)
        begin = time.monotonic()
        time.sleep(2)
        end = time.monotonic()
        for process in reversed(meter.tree([root.pid])):
            process.kill()
    use = watching.use(begin, end)
    assert use.cores is not None
    assert 0.1 < use.cores < 1.3, "one core, on a machine that others use as well"
    assert use.host_bytes is not None
    assert 64 * 2**20 < use.host_bytes < 256 * 2**20
    assert (use.gpu_busy, use.gpu_bytes) == (0.9, 2**30)
    assert watching.use(end + 10, end + 20) == meter.Use(None, None, None, None)


def test_without_nvidia_smi_the_rest_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(meter, "SECONDS", 0.05)
    with Meter([os.getpid()], ["0"]) as watching:
        time.sleep(0.5)
    use = watching.use(0, time.monotonic())
    assert use.cores is not None
    assert (use.gpu_busy, use.gpu_bytes) == (None, None)


def test_what_takes_too_long_is_killed(capsys):
    began, command = time.monotonic(), [sys.executable, "-c", "import time; time.sleep(60)"]
    with ended(subprocess.Popen(command, stdout=subprocess.PIPE), 0.2) as process:
        assert process.stdout.readline() == b""
    assert time.monotonic() - began < 30
    assert "longer than 0.2 s" in capsys.readouterr().err


def result(system, rate, **more):
    return Result(
        scenario="2b-13tiles", title="2B", backend="turbomind", system=system, rows=1000, seconds=1000 / rate,
        start_seconds=14.0, output_tokens=72_000, **{
            "input_tokens": 3_369_000, "wrong": 0, "cores": 1.25, "host_bytes": 3 * 2**30, "gpu_busy": 0.98,
            "gpu_bytes": 100 * 2**30, **more,
        },
    )  # fmt: skip


def test_the_table_is_markdown_also_of_what_is_only_there_in_part():
    results = [result("ceiling", 20.0), result("loop", 5.9, gpu_busy=None), result("run", 19.5, gpu_wait=0.004)]
    lines = gpu.table(results).splitlines()
    assert "| 2B, turbomind | 20.0 | 5.9 | 19.5 | 97.5% |" in lines
    assert "| 2B, turbomind | run | 19.5 | 1,000 | 51.3 | 98% | 1.2 | 3.0 GiB | 100.0 GiB | 0.4% |" in lines
    assert "| 2B, turbomind | loop | 5.9 | 1,000 | 169.5 |  | 1.2 | 3.0 GiB | 100.0 GiB |  |" in lines
    assert "| 2B, turbomind | 20.0 |  |  |  |" in gpu.table(results[:1])
    assert len({line.count("|") for line in lines if line}) == 2


def test_results_that_cannot_be_compared_are_faults():
    assert gpu.unequal([result("ceiling", 20), result("run", 19)]) == []
    [wrong, differ] = gpu.unequal([result("ceiling", 20), result("run", 19, wrong=3, input_tokens=3_368_000)])
    assert wrong == "2b-13tiles, run: 3 of 1000 answers are not as long as they should be"
    assert "ceiling 3369.00, run 3368.00" in differ


@pytest.mark.parametrize("lacks", ["lmdeploy", "gpu"])
def test_what_the_machine_lacks_is_said(monkeypatch, capsys, tmp_path, lacks):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tiny"])
    monkeypatch.setattr(gpu, "find_spec", lambda _: None if lacks == "lmdeploy" else object())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert ("needs LMDeploy" if lacks == "lmdeploy" else "needs an NVIDIA GPU: no NVIDIA driver") in said


# ------------------------------------------------------------------------------------------------ all of it but the GPU


def without_gpu(tmp_path, monkeypatch, **behaviour):
    """All that a GPU would do is done by the CPU core of LMDeploy's tests, in all processes that have LMDeploy."""
    from tests.engines import cpu_core

    stand_in(tmp_path / "bin", monkeypatch)
    core = cpu_core.with_cpu_core(tmp_path / "core", whole=True, **behaviour)
    (tmp_path / "core" / "sitecustomize.py").write_text(
        "import sys\n"
        "if {'batchvl.serving.engine_main', 'benchmarks.baseline'} & set(sys.orig_argv):\n"
        "    from tests.engines import cpu_core\n"
        "    cpu_core.install()\n"
    )
    for name in ("PYTHONPATH", cpu_core.VARIABLE):
        monkeypatch.setenv(name, core[name])


def command(tmp_path, *told):
    options = ["--backend", "pytorch", "--option", "dtype=float16", "--models", str(tmp_path / "models")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options, *told], capture_output=True, text=True
    )
    return done.returncode, done.stdout, done.stdout + done.stderr


@pytest.mark.lmdeploy
@pytest.mark.timeout(600)
def test_three_systems_answer_the_same_at_the_length_they_are_told(tmp_path, monkeypatch):
    """The model is the benchmark's own, run by transformers, and would be stopped where it says an end."""
    without_gpu(tmp_path, monkeypatch, answer="model")
    out = tmp_path / "out"

    code, said, all_said = command(tmp_path, "tiny", "--rows", "12", "--out", str(out))

    assert code == 0, all_said
    results = [json.loads(path.read_bytes()) for path in sorted(out.glob("*.json"))]
    assert [(each["system"], each["rows"], each["wrong"]) for each in results] == [
        ("ceiling", 12, 0), ("loop", 3, 0), ("run", 12, 0),
    ]  # fmt: skip
    wanted = [row.tokens for row in SCENARIOS["tiny"][0].make_rows(12)]
    assert [each["output_tokens"] for each in results] == [sum(wanted), sum(wanted[:3]), sum(wanted)]
    assert len({each["input_tokens"] / each["rows"] for each in results}) == 1
    assert results[0]["input_tokens"] / 12 > 256
    assert results[0]["gpu_busy"] == pytest.approx(0.9)
    assert results[0]["cores"] > 0.1
    assert results[0]["host_bytes"] > 2**28
    assert results[2]["gpu_wait"] is not None
    assert "| TINY, 640x480, 1 tile, dtype=float16, pytorch |" in said
    assert command(tmp_path, "--out", str(out))[1].splitlines()[2] in said, "the table once more"


@pytest.mark.lmdeploy
def test_a_checkpoint_of_8_bits_has_a_scale_for_each_block(tmp_path):
    from safetensors.torch import load_file

    from benchmarks.internvl import make

    whole, small = (
        load_file(make("tiny", tmp_path / str(fp8), max_tiles=1, fp8=fp8) / "model.safetensors")
        for fp8 in (False, True)
    )
    scaled = {name for name in small if name.endswith("_scale_inv")}
    assert len(scaled) == 2 * 7, "of each layer's attention four, and of its other half three"
    assert small.keys() - scaled == whole.keys()
    assert all("language_model" in name for name in scaled)
    for name, tensor in whole.items():
        if (scales := small.get(name + "_scale_inv")) is None:
            assert tensor.equal(small[name])
            continue
        assert scales.shape == (tensor.shape[0] // 128, tensor.shape[1] // 128)
        again = small[name].float() * scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert (again - tensor).norm() / tensor.norm() < 0.04, "three bits behind the first"
    config = json.loads((tmp_path / "True" / "config.json").read_text())
    assert config["text_config"]["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.lmdeploy
@pytest.mark.timeout(600)
def test_two_gpus_share_the_rows_and_what_fails_is_said(tmp_path, monkeypatch):
    from dataclasses import replace

    from benchmarks.internvl import make
    from benchmarks.measure import Bench, Failed

    without_gpu(tmp_path, monkeypatch, answer="say", say="x" * 200)
    model, [tiny] = make("tiny", tmp_path / "model", max_tiles=1), SCENARIOS["tiny"]
    options = [("dtype", "float16")]
    bench = Bench(replace(tiny, gpus=2), model, "pytorch", options, ["0", "1"], tmp_path / "two", 300)
    found = bench.measure("ceiling", tiny.make_rows(21))
    assert (found.rows, found.wrong) == (21, 0)
    jobs = [json.loads(path.read_bytes()) for path in sorted((tmp_path / "two" / "ceiling").glob("job-*.json"))]
    assert [len(job["rows"]) for job in jobs] == [11, 10]
    assert found.output_tokens == sum(row.tokens for row in tiny.make_rows(21))

    bench = Bench(tiny, tmp_path / "nothing", "pytorch", options, ["0"], tmp_path / "failing", 300)
    for system in ("ceiling", "run"):
        with pytest.raises(Failed, match="nothing"):
            bench.measure(system, tiny.make_rows(2))
