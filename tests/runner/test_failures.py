"""Failed rows are rows of the output with an error code; the limits of failures."""

import base64

import numpy as np
import pytest
from PIL import Image

from batchvl.runner import scheduler

from ..manifest.writing import write, write_bytes
from .running import answers, codes, command, make_image, questions, responses, run, shell


@pytest.fixture
def bad(tmp_path):
    """A manifest with a row for each kind of failure among good ones, and the expected error codes by row."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "page.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    make_image(tmp_path / "large.png", 1, (200, 200))
    good = make_image(tmp_path / "good.png", 2)
    uri = "data:image/png;base64," + base64.b64encode(good.read_bytes()).decode()
    images = {
        "missing_file": "nowhere.png",
        "truncated_image": "cut.jpg",
        "not_an_image": "page.jpg",
        "too_many_pixels": "large.png",
        "forbidden_address": "http://127.0.0.1:9/cat.png",
        "unsupported_source": "ftp://example.org/cat.png",
        "invalid_data_uri": "data:image/png;base64,!!!",
        "forbidden_path": "/etc/passwd",
    }
    rows = [{"prompt": f"fine {n}", "image": [good.name, uri][n % 2]} for n in range(4)]
    rows += [{"prompt": "what?", "image": source} for source in images.values()]
    rows += [
        {"prompt": None, "image": "good.png"},
        {"prompt": "<IMAGE_TOKEN> or <IMAGE_TOKEN>?", "image": "good.png"},
        {"prompt": 5, "image": "good.png"},
        {"prompt": "hot", "image": "good.png", "generation": {"temperature": -1}},
        {"prompt": "fine too", "image": "good.png", "generation": {"temperature": 0.5}},
    ]
    manifest = write(tmp_path / "m.jsonl", rows)
    write_bytes(manifest, manifest.read_bytes() + b'{"prompt": "a line that ends here\n')
    wanted = [
        *images,
        "missing_prompt",
        "image_count_mismatch",
        "invalid_row",
        "invalid_generation",
        None,
        "invalid_row",
    ]
    return manifest, {number: code for number, code in enumerate(wanted, 4) if code}


def test_each_kind_of_bad_row(bad):
    manifest, wanted = bad
    summary = run(manifest, {"fail_every": 3}, max_image_pixels=10_000)
    wanted |= {0: "engine_error", 3: "engine_error"}
    assert codes(summary) == wanted
    rows = answers(summary)
    assert [row["row"] for row in rows] == list(range(18))
    assert {row["row"] for row in rows if row["status"] == "ok"} == {1, 2, 16}
    for row in rows:
        assert (row["response"] is None) == (row["status"] == "failed") == (row["error"] is not None)
        if row["error"]:
            assert row["error"]["stage"]
            assert row["error"]["message"]
            assert "Traceback" not in row["error"]["message"]
    assert (summary.exit_code, summary.ok, summary.failed) == (3, 3, 15)
    assert sum(summary.failures.values()) == 15
    assert "--accept-failures 0" in summary.message
    logs = "".join(path.read_text() for path in manifest.parent.rglob("*.log"))
    assert "Traceback" not in logs

    for accepted, code in (("14", 3), ("15", 0), ("83%", 3), ("84%", 0)):
        again = run(manifest, max_image_pixels=10_000, accept_failures=accepted)
        assert (again.exit_code, again.resumed, again.failures) == (code, 18, summary.failures)


def test_flaky_rows_are_retried_and_their_attempts_recorded(tmp_path):
    summary = run(questions(tmp_path / "m.jsonl", 60), {"flaky_every": 20})
    assert responses(summary) == [f"q {n}" for n in range(60)]
    assert {row["row"]: row["attempts"] for row in answers(summary) if row["attempts"] != 1} == {0: 2, 20: 2, 40: 2}
    assert summary.exit_code == 0
    none = run(tmp_path / "m.jsonl", {"flaky_every": 20}, retries=0, output=tmp_path / "none")
    assert codes(none) == dict.fromkeys((0, 20, 40), "engine_error")
    assert all(row["error"]["retryable"] for row in answers(none) if row["error"])


def test_max_failures_stops_the_run_which_can_be_resumed(tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 1500)
    behaviour = {"fail_every": 2, "delay": 0.1}
    summary = run(manifest, behaviour, max_failures="20")
    assert summary.exit_code == 4
    assert 20 < summary.failed < 750
    assert summary.rows < 1500
    assert "more than --max-failures 20" in summary.message
    assert "engine_error" in summary.message
    assert summary.results is None
    rest = run(manifest, behaviour, accept_failures="50%")
    assert (rest.exit_code, rest.rows, rest.resumed, rest.failed) == (0, 1500, summary.rows, 750)
    wanted = [f"q {n}" if n % 2 else None for n in range(1500)]
    assert responses(rest) == wanted


def test_a_percentage_of_failures(tmp_path):
    manifest = questions(tmp_path / "m.parquet", 1000)
    behaviour = {"fail_every": 10, "delay": 0.1}
    assert run(manifest, behaviour, max_failures="11%").exit_code == 3, "a tenth fails"
    stopped = run(manifest, behaviour, max_failures="1%", output=tmp_path / "out")
    assert stopped.exit_code == 4
    assert stopped.rows < 1000


def test_exit_code_and_summary_of_the_command(bad, tmp_path):
    manifest, wanted = bad
    done = shell(command(manifest.name, "--max-image-pixels", "10000"), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "18 rows done: 5 ok, 13 failed" in done.stderr
    assert "2 invalid_row" in done.stderr
    assert "output: m-batchvl/results.parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(wanted) == 13


def test_more_rows_wait_for_a_retry_than_may(tmp_path, monkeypatch):
    monkeypatch.setattr(scheduler, "MIN_IN_FLIGHT", 4)
    monkeypatch.setattr(scheduler, "WAITING_ROWS", 4)
    summary = run(questions(tmp_path / "m.jsonl", 60), {"flaky_every": 1, "rows": 2}, batch_size=2)
    assert (summary.ok, summary.exit_code) == (60, 0)
    assert {row["attempts"] for row in answers(summary)} == {2}
