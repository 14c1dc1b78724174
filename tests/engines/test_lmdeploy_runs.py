"""Whole runs with the engine lmdeploy: processes, image workers, manifests; everything but the GPU's own part."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

import batchvl
from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import draw_image
from tests.manifest.writing import write
from tests.timing import scaled

pytestmark = [pytest.mark.lmdeploy, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
FLAGS = ["--engine", "lmdeploy", "--backend", "pytorch", "--dtype", "float16", "--image-workers", "1"]
OPTIONS = {"engine": "lmdeploy", "backend": "pytorch", "dtype": "float16", "image_workers": 1, "quiet": True}


def command(manifest: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "batchvl", "run", str(manifest), "--model", "shapes", *FLAGS, *flags]


def run_command(tmp_path: Path, arguments: list[str], **behaviour) -> subprocess.CompletedProcess[str]:
    """Run a command whose engine processes use the core with this behaviour."""
    environment = cpu_core.with_cpu_core(tmp_path / "core", **behaviour)
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=scaled(300))


def read_results(out: Path) -> list[dict]:
    rows = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(len(rows)))
    return rows


def read_engine_logs(out: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(out.glob("shard-*/engine-*.log")))


def read_requests(record: Path) -> list[dict]:
    """Return what reached the core."""
    return [json.loads(line) for line in record.read_text().splitlines()]


def text_digest(prompt: str) -> str:
    """Return the core's answer to a question without images."""
    from lmdeploy.model import get_chat_template
    from lmdeploy.tokenizer import Tokenizer

    text = get_chat_template(str(MODEL)).messages2prompt([{"role": "user", "content": prompt}])
    return cpu_core.digest(Tokenizer(str(MODEL)).encode(text), None)


# ------------------------------------------------------------------------------------------------------------- answers


def test_the_answers_about_images_pairs_and_turns_are_right(tmp_path):
    out = tmp_path / "out"
    manifest = ROOT / "manifests" / "shapes.jsonl"
    done = run_command(
        tmp_path, command(manifest, "--keep", "truth", "--max-new-tokens", "48", "-o", str(out)), answer="model"
    )

    assert done.returncode == 3, done.stderr
    rows = read_results(out)
    failed = {row["id"]: row["error"]["code"] for row in rows if row["error"]}
    answered = [row for row in rows if not row["error"]]
    assert sorted(failed) == sorted(failed.values())
    assert len(failed) == 3
    wrong = [
        (row["id"], answers, row["truth"])
        for row in answered
        if (answers := row["responses"] or [row["response"]]) != json.loads(row["truth"])
    ]
    assert not wrong
    assert Counter(len(row["images"]) for row in answered)[2] == 14
    assert sum(row["responses"] is not None for row in rows) == 12
    assert {row["finish_reason"] for row in answered} == {"stop"}
    engine = json.loads(pq.read_metadata(out / "results.parquet").metadata[b"batchvl.engine"])
    assert (engine["engine"], engine["backend"], engine["dtype"]) == ("lmdeploy", "pytorch on no GPU", "float16")
    assert len(engine["template_sha256"]) == 64


def write_image(directory: Path, number: int) -> tuple[str, Image.Image]:
    """Write an image file; return its name and the image as it must be seen: upright, transparency on white."""
    file = directory / f"{number}.png"
    image = draw_image(40 + number * 7 % 200, 40 + number * 11 % 150, number)
    if number % 5 == 1:
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        image.save(file, exif=exif)
        with Image.open(file) as rotated:
            return file.name, ImageOps.exif_transpose(rotated).convert("RGB")
    if number % 5 == 2:
        transparent = image.convert("RGBA")
        alpha = draw_image(*image.size, number + 1000).convert("L").point(lambda level: 255 * (level > 128))
        transparent.putalpha(alpha)
        transparent.save(file)
        return file.name, Image.alpha_composite(Image.new("RGBA", image.size, "white"), transparent).convert("RGB")
    image.save(file)
    return file.name, image


def test_every_row_is_answered_about_its_own_images_by_the_library_too(tmp_path, monkeypatch):
    """Many batches are open, with more rows than the engine computes at a time.

    Each answer is a digest of the prompt and pixels that LMDeploy's own code, in this process, makes of the row alone.
    """
    import torch
    from lmdeploy.model import get_chat_template
    from lmdeploy.tokenizer import Tokenizer
    from lmdeploy.vl.model.builder import load_vl_model

    vision_model = load_vl_model(str(MODEL), "pytorch")
    vision_model.set_mm_feature_dtype(torch.float16)
    template, tokenizer = get_chat_template(str(MODEL)), Tokenizer(str(MODEL))
    manifest, expected = [], []
    for number in range(120):
        prompt = f"Question {number}?"
        files = [write_image(tmp_path, 3 * number + at) for at in range((1, 1, 2, 0, 3)[number % 5])]
        manifest.append({"id": f"id-{number}", "prompt": prompt, "images": [name for name, _ in files]})
        if not files:
            expected.append(text_digest(prompt))
            continue
        content = [{"type": "image", "data": image} for _, image in files]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]
        inputs = vision_model.to_pytorch(vision_model.preprocess(messages), template, tokenizer)
        expected.append(cpu_core.digest(inputs["input_ids"], inputs["multimodal"]))
    record = tmp_path / "requests.jsonl"
    behaviour = {"answer": "digest", "record": str(record), "delay": 0.002}
    for name, value in cpu_core.with_cpu_core(tmp_path / "core", **behaviour).items():
        monkeypatch.setenv(name, value)

    summary = batchvl.run(
        write(tmp_path / "m.jsonl", manifest), output=tmp_path / "out", model="shapes", batch_size=4, **OPTIONS
    )

    assert summary.exit_code == 0, summary
    rows = read_results(tmp_path / "out")
    assert [row["id"] for row in rows] == [f"id-{number}" for number in range(120)]
    assert [row["response"].strip() for row in rows] == expected
    assert len(set(expected)) == 120
    in_flight = [request["in_flight"] for request in read_requests(record)]
    assert max(in_flight) == cpu_core.ROWS, "as many as it computes at a time, and no more"
    assert len(in_flight) == 121, "each row once, and the first request of the engine's start"


# --------------------------------------------------------------------------------------------------------- supervision


def test_an_engine_that_fails_in_every_way_is_replaced_and_every_row_is_answered(tmp_path):
    """Each failure happens once. In addition, the process is killed from outside."""
    out, record = tmp_path / "out", tmp_path / "requests.jsonl"
    failures = {
        "Question 20?": {"block": True},
        "Question 45?": {"status": "ENGINE_STOP_ERROR"},
        "Question 70?": {"unhealthy": True},
        "Question 299?": {"hang": True},  # the last: while others are answered, a row that hangs is merely slow
    }
    rules = {text: {**failure, "once": str(tmp_path / text.strip("?"))} for text, failure in failures.items()}
    manifest = write(tmp_path / "m.jsonl", [{"prompt": f"Question {number}?"} for number in range(300)])
    flags = ("--batch-size", "4", "--hang-timeout", "4s", "--row-timeout", "60s", "-o", str(out))
    behaviour = {"answer": "digest", "delay": 0.02, "record": str(record), "rules": rules}
    environment = cpu_core.with_cpu_core(tmp_path / "core", **behaviour)

    with subprocess.Popen(
        command(manifest, *flags), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: record.exists() and len(read_requests(record)) > 8)
        [engine] = [
            child
            for child in psutil.Process(run.pid).children(recursive=True)
            if "batchvl.serving.engine_main" in child.cmdline()
        ]
        engine.send_signal(signal.SIGKILL)
        stdout, stderr = run.communicate(timeout=scaled(350))

    assert run.returncode == 0, stdout + stderr
    rows = read_results(out)
    assert all(row["response"].strip() == text_digest(f"Question {row['row']}?") for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert len(list(tmp_path.glob("Question *"))) == 4, "each failure happened"
    assert json.loads((out / "summary.json").read_text())["engine_deaths"] == 5
    log = read_engine_logs(out)
    assert "unhealthy, as configured" in log
    assert "LMDeploy's engine is gone" in log
    assert "Event loop is closed" not in log, "the rows in flight of an engine that is gone bury the reason"
    assert "in async_stream_infer" in log, "the stack of the blocked event loop"
    assert max(request["in_flight"] for request in read_requests(record)) <= cpu_core.ROWS


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + scaled(120)
    while not condition():
        assert time.monotonic() < end, "the condition never held"
        time.sleep(0.01)


def test_a_row_that_kills_the_engine_is_found_and_slow_rows_time_out(tmp_path):
    """Both occur among rows that are answered: the poison row is found by bisection, slow rows are aborted."""
    out, record = tmp_path / "out", tmp_path / "requests.jsonl"
    rules = {"poison": {"die": True}, "slow": {"delay": 1, "answer": "text", "text": "z" * 100}}
    prompts = [f"Question {number}?" for number in range(40)]
    prompts[17] = "poison"
    for number in (3, 4, 5, 30):
        prompts[number] = "slow"
    manifest = write(tmp_path / "m.jsonl", [{"prompt": prompt} for prompt in prompts])
    flags = ("--batch-size", "1", "--engine-option", "max_batch_size=2", "--row-timeout", "2s", "--retries", "0")

    done = run_command(
        tmp_path, command(manifest, *flags, "-o", str(out)), answer="digest", rules=rules, record=str(record)
    )

    assert done.returncode == 3, done.stdout + done.stderr
    rows = read_results(out)
    timeouts = {number: "row_timeout" for number, prompt in enumerate(prompts) if prompt == "slow"}
    assert {row["row"]: row["error"]["code"] for row in rows if row["error"]} == {17: "engine_crashed", **timeouts}
    assert "SIGKILL" in rows[17]["error"]["message"]
    assert "longer than 2 s" in rows[3]["error"]["message"]
    assert all(row["response"] for row in rows if not row["error"])
    assert max(request["in_flight"] for request in read_requests(record)) == 2


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def manifest(tmp_path):
    return write(tmp_path / "m.jsonl", [{"prompt": "What?"}])


def refused_run(tmp_path, manifest, *flags, **behaviour) -> str:
    """Return what a run prints to stderr that exits with code 2 and leaves no answers."""
    done = run_command(tmp_path, command(manifest, *flags, "-o", str(tmp_path / "out")), **behaviour)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/**/*.parquet"))
    return done.stderr


def test_a_temperature_that_lmdeploy_does_not_take_is_an_error_of_the_command(tmp_path, manifest):
    assert "--temperature 3: LMDeploy takes 2 at most" in refused_run(tmp_path, manifest, "--temperature", "3")


def test_a_gpu_that_is_too_small_is_an_error_of_the_command_with_advice(tmp_path, manifest):
    message = refused_run(tmp_path, manifest, load="CUDA out of memory. Tried to allocate 2.50 GiB.")

    for words in ("ran out of GPU memory", "16.0 of 16.0 GiB", "--cache-max-entry-count below 0.8", "--session-len"):
        assert words in message
