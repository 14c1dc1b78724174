"""`batchvl.run` in a script without a guard, in a notebook and in a thread; no process is left behind."""

import asyncio
import json
import os
import signal
import sys
import threading

import pytest

import batchvl
from batchvl.errors import BatchvlError, ManifestError
from batchvl.runner.progress import Progress

from .running import answers, children, make_image, questions, responses, run, shell

SCRIPT = """
import sys
print("imported", __name__)
import batchvl

summary = batchvl.run("m.jsonl", engine="fake", quiet=True, image_workers=2)
print(type(summary).__name__, summary.ok, summary.exit_code, summary.results)
import psutil
print("left", psutil.Process().children())
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def test_a_script_without_a_guard(tmp_path):
    with (tmp_path / "m.jsonl").open("w") as file:
        for number in range(5):
            make_image(tmp_path / f"{number}.png", number)
            file.write(json.dumps({"prompt": "what?", "image": f"{number}.png"}) + "\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    done = shell([sys.executable, "script.py"], cwd=tmp_path)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "imported __main__",
        "Summary 5 0 m-batchvl/results.parquet",
        "left []",
        "False False",
    ]


async def test_inside_a_running_loop_as_in_a_notebook(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 30)
    summary = run(manifest)  # blocks the cell
    assert isinstance(summary, batchvl.Summary)
    assert responses(summary) == [f"q {n}" for n in range(30)]
    with pytest.raises(ManifestError):
        run(tmp_path / "none.jsonl")
    both = await asyncio.gather(
        *(asyncio.to_thread(run, questions(tmp_path / f"{name}.jsonl", 40)) for name in ("one", "two"))
    )
    assert [len(answers(summary)) for summary in both] == [40, 40]
    assert not children()


async def test_interrupting_a_cell_of_a_notebook_stops_the_run(tmp_path, monkeypatch):
    original_commit = Progress.commit
    main = threading.main_thread().ident
    sent = []

    def commit(self, counts):
        original_commit(self, counts)
        if not sent:
            sent.append(True)
            signal.pthread_kill(main, signal.SIGINT)

    monkeypatch.setattr(Progress, "commit", commit)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # as in the kernel of a notebook
    try:
        summary = run(questions(tmp_path / "m.jsonl", 5000), {"delay": 0.02})
    finally:
        signal.signal(signal.SIGINT, before)
    assert summary.exit_code == 75
    assert 0 < summary.rows < 5000
    assert "interrupt" in summary.message
    assert not children()


def test_in_a_thread(tmp_path):
    manifest, summaries = questions(tmp_path / "m.jsonl", 30), []
    thread = threading.Thread(target=lambda: summaries.append(run(manifest)))
    thread.start()
    thread.join()
    assert responses(summaries[0]) == [f"q {n}" for n in range(30)]
    assert not children()


def test_file_descriptors_and_threads_are_released(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 30)
    run(manifest, output=tmp_path / "0")
    held, threads = sorted(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(1, 3):
        run(manifest, {"die_on": [5]}, output=tmp_path / str(number))
    assert len(os.listdir("/proc/self/fd")) <= len(held)
    assert threading.active_count() <= threads


def test_errors_are_batchvl_errors(tmp_path):
    for options in ({"no_such": 1}, {"limit": "x"}, {"config": tmp_path / "none.toml"}):
        with pytest.raises(BatchvlError):
            run(questions(tmp_path / "m.jsonl", 2), **options)
