"""Runs on several replicas: the same answers as with one, whatever happens to one of them."""

import json
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from batchvl.errors import OptionError

from .running import (
    PATIENCE,
    answers,
    children,
    codes,
    command,
    environment,
    image_digest,
    journalled,
    make_image,
    questions,
    responses,
    run,
    wait_until,
)


def engines(pid):
    """Return the engine processes of a run, in the order of their start."""
    children = psutil.Process(pid).children()
    engines = [child for child in children if "batchvl.serving.engine_main" in child.cmdline()]
    return sorted(engines, key=lambda child: child.create_time())


def test_every_row_is_answered_once_and_the_summary_has_the_number_of_replicas(tmp_path):
    with (tmp_path / "m.jsonl").open("w") as file:
        for number in range(120):
            make_image(tmp_path / f"{number}.png", number)
            file.write(json.dumps({"prompt": f"q {number}", "image": f"{number}.png"}) + "\n")
    summary = run(tmp_path / "m.jsonl", {"delay": 0.05}, gpus=3, batch_size=4)
    assert responses(summary) == [f"q {n} {image_digest(tmp_path / f'{n}.png')}" for n in range(120)]
    assert (summary.exit_code, summary.engine.replicas, summary.engine_deaths) == (0, 3, 0)
    assert "fake 1" in str(summary)
    assert "3 replicas" in str(summary)
    logs = sorted(path.name for path in Path(summary.output).glob("shard-*/engine-*.log"))
    assert logs == ["engine-0001-gpu1.log", "engine-0001-gpu2.log", "engine-0001.log"]
    assert 0 <= summary.gpu_wait <= 1
    assert 0 < summary.engine_seconds <= summary.seconds
    assert not children()


def test_one_is_killed_during_the_run(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 600)
    flags = ("--gpus", "3", "--batch-size", "4")
    with subprocess.Popen(
        command(manifest, *flags, fake={"delay": 0.1, "start_delay": 0.3}),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: journalled(tmp_path / "m-batchvl") and len(engines(process.pid)) == 3)
        os.kill(engines(process.pid)[1].pid, signal.SIGKILL)
        output = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 0, output
    assert "was killed by SIGKILL" in output
    assert "600 rows done: 600 ok" in output
    again = run(manifest)
    assert again.resumed == 600
    assert responses(again) == [f"q {n}" for n in range(600)]


@pytest.mark.parametrize(("poison", "size"), [([17], 4), ([0, 150, 151], 8)])
def test_poison_rows_fail_and_the_others_are_answered(poison, size, tmp_path):
    summary = run(questions(tmp_path / "m.jsonl", 300), {"die_on": poison}, gpus=3, batch_size=size)
    assert responses(summary) == [None if n in poison else f"q {n}" for n in range(300)]
    assert codes(summary) == dict.fromkeys(poison, "engine_crashed")
    [message] = {row["error"]["message"].split(":")[0] for row in answers(summary) if row["error"]}
    assert message == "the engine died twice, the last time over this row alone"
    assert summary.engine_deaths <= len(poison) * 10
    assert not children()


def test_a_row_over_which_one_hangs(tmp_path):
    summary = run(
        questions(tmp_path / "m.jsonl", 60), {"hang_on": [20], "rows": 2}, gpus=3, hang_timeout="0.6s", batch_size=2
    )
    assert codes(summary) == {20: "engine_crashed"}
    assert summary.ok == 59


def test_no_row_fails_if_engines_die_now_and_then(tmp_path):
    behaviour = {"die_after": 40, "delay": 0.001, "spread": 0.03}
    summary = run(questions(tmp_path / "m.jsonl", 300), behaviour, gpus=3, batch_size=8)
    assert responses(summary) == [f"q {n}" for n in range(300)]
    assert summary.engine_deaths >= 3


def test_engines_that_always_die_end_the_run(tmp_path):
    summary = run(questions(tmp_path / "m.jsonl", 100), {"die_on": list(range(100))}, gpus=3)
    assert (summary.exit_code, summary.rows) == (1, 0)
    assert "died 2 times before its first answer" in summary.message
    assert not children()


def test_impossible_options_are_refused_before_anything_is_written(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 3)
    with pytest.raises(OptionError, match="--device cpu, which names one device"):
        run(manifest, gpus=2, device="cpu")
    with pytest.raises(OptionError, match="no such thing"):
        run(manifest, {"refuse": "no such thing"}, gpus=3)
    assert not (tmp_path / "m-batchvl").exists()
    assert not children()
