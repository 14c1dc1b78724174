"""Whole runs with the engine lmdeploy: processes, image workers, manifests, all but the GPU's own part."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageOps

import batchvl
from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import picture
from tests.manifest.writing import write
from tests.timing import scaled

pytestmark = [pytest.mark.lmdeploy, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
FLAGS = ["--engine", "lmdeploy", "--backend", "pytorch", "--dtype", "float16", "--image-workers", "1"]
OPTIONS = {"engine": "lmdeploy", "backend": "pytorch", "dtype": "float16", "image_workers": 1, "quiet": True}


def command(manifest: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "batchvl", "run", str(manifest), "--model", "shapes", *FLAGS, *flags]


def shell(tmp_path: Path, arguments: list[str], **behaviour) -> subprocess.CompletedProcess[str]:
    environment = cpu_core.with_cpu_core(tmp_path / "core", **behaviour)
    return subprocess.run(arguments, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=scaled(300))


def rows(out: Path) -> list[dict]:
    found = pq.read_table(out / "results.parquet").to_pylist()
    assert [row["row"] for row in found] == list(range(len(found)))
    return found


def log(out: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in sorted(out.glob("shard-*/engine-*.log")))


def asked(record: Path) -> list[dict]:
    return [json.loads(line) for line in record.read_text().splitlines()]


def words(prompt: str) -> str:
    """The core's answer to a question without pictures."""
    from lmdeploy.model import get_chat_template
    from lmdeploy.tokenizer import Tokenizer

    text = get_chat_template(str(MODEL)).messages2prompt([{"role": "user", "content": prompt}])
    return cpu_core.digest(Tokenizer(str(MODEL)).encode(text), None)


# ------------------------------------------------------------------------------------------------------------- answers


def test_pictures_pairs_and_turns_are_answered_right(tmp_path):
    out = tmp_path / "out"
    done = shell(
        tmp_path,
        command(ROOT / "manifests" / "shapes.jsonl", "--keep", "truth", "--max-new-tokens", "48", "-o", str(out)),
        answer="model",
    )

    found = rows(out)
    assert done.returncode == 3, done.stderr
    failed = {row["id"]: row["error"]["code"] for row in found if row["error"]}
    assert sorted(failed) == sorted(failed.values())
    assert len(failed) == 3
    wrong = [
        (row["id"], said, row["truth"])
        for row in found
        if not row["error"] and (said := row["responses"] or [row["response"]]) != json.loads(row["truth"])
    ]
    assert not wrong
    assert Counter(len(row["images"]) for row in found if not row["error"])[2] == 14
    assert sum(row["responses"] is not None for row in found) == 12
    assert {row["finish_reason"] for row in found if not row["error"]} == {"stop"}
    ran = json.loads(pq.read_metadata(out / "results.parquet").metadata[b"batchvl.engine"])
    assert (ran["engine"], ran["backend"], ran["dtype"]) == ("lmdeploy", "pytorch on no GPU", "float16")
    assert len(ran["template_sha256"]) == 64


def drawn(folder: Path, number: int) -> tuple[str, Image.Image]:
    """A picture's file, and as it is to be seen: upright, and on white where it is transparent."""
    plain = picture(40 + number * 7 % 200, 40 + number * 11 % 150, number)
    if number % 5 == 1:
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        plain.save(folder / f"{number}.png", exif=exif)
        with Image.open(folder / f"{number}.png") as turned:
            return f"{number}.png", ImageOps.exif_transpose(turned).convert("RGB")
    if number % 5 == 2:
        glass = plain.convert("RGBA")
        glass.putalpha(picture(*plain.size, number + 1000).convert("L").point(lambda level: 255 * (level > 128)))
        glass.save(folder / f"{number}.png")
        return f"{number}.png", Image.alpha_composite(Image.new("RGBA", plain.size, "white"), glass).convert("RGB")
    plain.save(folder / f"{number}.png")
    return f"{number}.png", plain


def test_every_row_is_answered_about_its_own_pictures_by_the_library_too(tmp_path, monkeypatch):
    """Many lists open, more rows than the engine computes at once: each answer is a digest of what preparing the row's
    pictures alone, by LMDeploy's own code and in this process, gives.
    """
    import torch
    from lmdeploy.model import get_chat_template
    from lmdeploy.tokenizer import Tokenizer
    from lmdeploy.vl.model.builder import load_vl_model

    alone = load_vl_model(str(MODEL), "pytorch")
    alone.set_mm_feature_dtype(torch.float16)
    template, tokenizer = get_chat_template(str(MODEL)), Tokenizer(str(MODEL))
    manifest, expected = [], []
    for number in range(120):
        files = [drawn(tmp_path, 3 * number + at) for at in range((1, 1, 2, 0, 3)[number % 5])]
        manifest.append({"id": f"id-{number}", "prompt": f"Question {number}?", "images": [name for name, _ in files]})
        content = [{"type": "image", "data": image} for _, image in files]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": f"Question {number}?"}]}]
        made = alone.to_pytorch(alone.preprocess(messages), template, tokenizer) if files else None
        digest = cpu_core.digest(made["input_ids"], made["multimodal"]) if made else words(f"Question {number}?")
        expected.append(digest)
    record = tmp_path / "asked.jsonl"
    behaviour = {"answer": "digest", "record": str(record), "delay": 0.002}
    for name, value in cpu_core.with_cpu_core(tmp_path / "core", **behaviour).items():
        monkeypatch.setenv(name, value)

    summary = batchvl.run(
        write(tmp_path / "m.jsonl", manifest), output=tmp_path / "out", model="shapes", batch_size=4, **OPTIONS
    )

    assert summary.exit_code == 0, summary
    found = rows(tmp_path / "out")
    assert [row["id"] for row in found] == [f"id-{number}" for number in range(120)]
    assert [row["response"].strip() for row in found] == expected
    assert len(set(expected)) == 120
    inflight = [each["inflight"] for each in asked(record)]
    assert max(inflight) == cpu_core.ROWS, "as many as it computes at once, and no more"
    assert len(inflight) == 121, "each row once, and the question at the start"


# --------------------------------------------------------------------------------------------------------- supervision


def test_an_engine_in_all_kinds_of_trouble_is_replaced_and_every_row_is_answered(tmp_path):
    """Each trouble happens once. One more is not ordered: somebody kills the process from outside."""
    out, record = tmp_path / "out", tmp_path / "asked.jsonl"
    troubles = {
        "Question 20?": {"block": True},
        "Question 45?": {"status": "ENGINE_STOP_ERROR"},
        "Question 70?": {"unwell": True},
        "Question 299?": {"hang": True},  # the last: as long as others are answered, one that hangs is merely slow
    }
    rules = {text: {**trouble, "once": str(tmp_path / text.strip("?"))} for text, trouble in troubles.items()}
    manifest = write(tmp_path / "m.jsonl", [{"prompt": f"Question {number}?"} for number in range(300)])
    flags = ("--batch-size", "4", "--hang-timeout", "4s", "--row-timeout", "60s", "-o", str(out))
    behaviour = {"answer": "digest", "delay": 0.02, "record": str(record), "rules": rules}
    environment = cpu_core.with_cpu_core(tmp_path / "core", **behaviour)

    with subprocess.Popen(
        command(manifest, *flags), env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        wait_until(lambda: record.exists() and len(asked(record)) > 8)
        [engine] = [
            child
            for child in psutil.Process(run.pid).children(recursive=True)
            if "batchvl.serving.engine_main" in child.cmdline()
        ]
        engine.send_signal(signal.SIGKILL)
        said, complaints = run.communicate(timeout=scaled(350))

    assert run.returncode == 0, said + complaints
    found = rows(out)
    assert all(row["response"].strip() == words(f"Question {row['row']}?") for row in found)
    assert {row["finish_reason"] for row in found} == {"stop"}
    assert len(list(tmp_path.glob("Question *"))) == 4, "each happened"
    assert json.loads((out / "summary.json").read_text())["engine_deaths"] == 5
    told = log(out)
    assert "unwell by order" in told
    assert "LMDeploy's engine is gone" in told
    assert "in async_stream_infer" in told, "the stack of the loop that stood still"
    assert max(each["inflight"] for each in asked(record)) <= cpu_core.ROWS


def wait_until(what) -> None:
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_a_row_that_kills_the_engine_is_convicted_and_slow_rows_time_out(tmp_path):
    """Both, among rows that are answered: the poison is found by halves, slow rows are stopped where they are."""
    out, record = tmp_path / "out", tmp_path / "asked.jsonl"
    rules = {"poison": {"die": True}, "slow": {"delay": 1, "answer": "say", "say": "z" * 100}}
    prompts = [f"Question {number}?" for number in range(40)]
    prompts[17] = "poison"
    for number in (3, 4, 5, 30):
        prompts[number] = "slow"
    manifest = write(tmp_path / "m.jsonl", [{"prompt": prompt} for prompt in prompts])

    done = shell(
        tmp_path,
        command(manifest, "--batch-size", "1", "--engine-option", "max_batch_size=2", "--row-timeout", "2s",
                "--retries", "0", "-o", str(out)),
        answer="digest", rules=rules, record=str(record),
    )  # fmt: skip

    assert done.returncode == 3, done.stdout + done.stderr
    found = rows(out)
    slow = {number: "row_timeout" for number, prompt in enumerate(prompts) if prompt == "slow"}
    assert {row["row"]: row["error"]["code"] for row in found if row["error"]} == {17: "engine_crashed", **slow}
    assert "SIGKILL" in found[17]["error"]["message"]
    assert "longer than 2 s" in found[3]["error"]["message"]
    assert all(row["response"] for row in found if not row["error"])
    assert max(each["inflight"] for each in asked(record)) == 2


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.fixture
def manifest(tmp_path):
    return write(tmp_path / "m.jsonl", [{"prompt": "What?"}])


def refused(tmp_path, manifest, *flags, **behaviour) -> str:
    """What the terminal says of a run that exits with 2 and leaves no answers."""
    done = shell(tmp_path, command(manifest, *flags, "-o", str(tmp_path / "out")), **behaviour)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out/**/*.parquet"))
    return done.stderr


def test_a_temperature_that_lmdeploy_does_not_take_is_an_error_of_the_command(tmp_path, manifest):
    assert "--temperature 3: LMDeploy takes 2 at most" in refused(tmp_path, manifest, "--temperature", "3")


def test_a_gpu_that_is_too_small_is_an_error_of_the_command_with_advice(tmp_path, manifest):
    said = refused(tmp_path, manifest, load="CUDA out of memory. Tried to allocate 2.50 GiB.")

    for word in ("ran out of GPU memory", "16.0 of 16.0 GiB", "--cache-max-entry-count below 0.8", "--session-len"):
        assert word in said
