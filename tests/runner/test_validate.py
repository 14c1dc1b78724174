"""`batchvl validate` reports the errors that a run would have, without a model and without fetching."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import os
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchvl
from batchvl.errors import ManifestError, OptionError
from batchvl.images.grouping import group_by_images
from batchvl.types import Row, WebImage
from batchvl.validation import survey

from ..faults.server import FaultServer
from ..manifest.writing import write, write_bytes
from .running import answers, children, make_image, run, shell
from .test_shared_images import random_images, web  # noqa: F401 - `web` is a fixture

LOOPBACK = {"allow_private": ["127.0.0.0/8"]}


def validate(manifest, **options):
    return batchvl.validate(manifest, quiet=True, **options)


def problems(report, level=None):
    """Return the example rows of each problem, up to three, by code."""
    chosen = [problem for problem in report.problems if level in (None, problem.level)]
    assert all(len(problem.examples) == min(problem.rows, 3) for problem in chosen)
    return {problem.code: [example.row for example in problem.examples] for problem in chosen}


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl", "m.jsonl.gz", "m.csv"])
def test_a_good_manifest(name, tmp_path):
    images = ["pictures/a.png", "https://example.org/b.png?token=1", "data:image/gif;base64,R0lGODlhAQABAAAAACw="]
    make_image(tmp_path / images[0], 1)
    rows = [
        {
            "id": f"r{n}",
            "prompt": "what is this?" + "?" * (n % 5),
            "image": images[n % 3] + "#" * (n % 3 == 1) * n,
            "site": "x",
        }
        for n in range(300)
    ]
    report = validate(write(tmp_path / name, rows))

    assert report.exit_code == 0
    assert (report.rows, report.failing, report.files, report.format) == (300, 0, 1, name.split(".")[1])
    assert (report.roles, report.ignored) == ({"id": "id", "prompt": "prompt", "image": "image"}, ("site",))
    assert (report.ids.type, report.ids.rows, report.ids.distinct) == ("string", 300, 300)
    characters = report.prompts.characters
    assert (characters.least, characters.median, characters.greatest) == (13, 15, 17)
    assert report.images.kinds == {"file": 100, "http": 100, "data": 100}
    assert (report.images.references, report.images.distinct) == (300, 102)
    # Every fifteenth row has the same prompt and image, except for the URLs, which differ.
    assert problems(report) == {"repeated_question": [15, 17, 18]}
    assert report.problems[0].rows == 200 - 10
    assert "Every row is valid" in str(report)


def many_problems(directory):
    """Return rows of each kind that fails before an image is opened, and a good one."""
    directory.mkdir(exist_ok=True)
    good = make_image(directory / "good.png", 2).name
    (directory / "empty.png").touch()
    (directory / "large.png").write_bytes(bytes(5000))
    (directory / "directory.png").mkdir()
    (directory / "out.png").symlink_to("/etc/passwd")
    (directory / "dangling.png").symlink_to("nowhere")
    large = "data:image/png;base64," + base64.b64encode(bytes(5000)).decode()
    files = ["nowhere", "directory", "dangling", "out", "empty", "large"]
    urls = ["127.0.0.1:9/a.png", "localhost/a.png", "169.254.169.254/latest/meta-data", "0x7f.1/", "a..b/a.png"]
    urls += ["example.org:99999/a.png", "", "me:secret@10.0.0.1/a.png?sig=secret"]
    sources = [
        *(f"{name}.png" for name in files),
        *("/etc/passwd", "../good.png/.."),
        *("data:image/png;base64,", large, "data:image/png;base64,!!!"),
        *("ftp://example.org/a.png", "s3://bucket/a.png", "file://elsewhere/a.png"),
        *(f"http://{url}" for url in urls),
        "https://[::1]/a.png",
    ]
    rows = [{"prompt": "what?", "images": [good, source], "generation": None} for source in sources]
    rows += [
        {"prompt": None, "images": [good]},
        {"prompt": "  ", "images": [good]},
        {"prompt": "", "images": [good]},
        {"prompt": "<IMAGE_TOKEN> or <IMAGE_TOKEN>?", "images": [good]},
        {"prompt": "what?", "images": [good] * 5},
        {"prompt": "what?", "images": ["gone.png"] * 5},
        {"prompt": "what?", "images": [good], "generation": json.dumps({"temperature": -1})},
        {"prompt": "what?", "images": [good], "generation": json.dumps({"warmth": 1})},
        {"prompt": "what?", "images": [good], "generation": "{"},
        {"prompt": "fine", "images": [good], "generation": None},
    ]
    return rows


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl"])
def test_each_row_that_would_fail_is_reported_with_the_error_that_it_has_in_a_run(name, tmp_path):
    directory = tmp_path / "in"
    manifest = write(directory / name, [row | {"id": n} for n, row in enumerate(many_problems(directory))])
    if name == "m.jsonl":
        bad = [b'{"id": 100, "prompt": "a line that ends here', b'{"prompt": 5}', b'{"prompt": "x", "images": [3]}']
        write_bytes(manifest, manifest.read_bytes() + b"".join(line + b"\n" for line in bad))
    options = {"max_image_bytes": 4000, "max_images": 4, "fetch_retries": 0, "fetch_timeout": 2}

    reported = {(e.row, p.code): e for p in validate(manifest, **options).problems for e in p.examples}
    summary = run(manifest, **options)

    errors = {row["row"]: (row["error"], row["id"]) for row in answers(summary) if row["status"] == "failed"}
    report = validate(manifest, **options)
    assert report.failing == len(errors) == report.rows - 1
    assert {p.code: p.rows for p in report.problems if p.code != "missing_id"} == summary.failures
    assert report.exit_code == 3
    assert len(reported) > 25
    for (row, code), example in reported.items():
        error, id = errors[row]
        assert (code, example.id) == (error["code"], id)
        assert example.found == " ".join(error["message"].split())


def test_messages_and_special_tokens(tmp_path):
    chats = [[{"role": "user", "content": "hi"}], [{"role": "assistant", "content": "ho"}], "hi"]
    report = validate(write(tmp_path / "m.jsonl", [{"messages": chat} for chat in chats]))
    assert problems(report) == {"invalid_messages": [1, 2]}
    rows = [{"prompt": "fine", "caption": text} for text in ("a cat", "<IMAGE_TOKEN>")]
    manifest = write(tmp_path / "n.jsonl", rows)
    assert problems(validate(manifest, prompt="what of {caption}?", special_tokens="fail")) == {"special_token": [1]}
    assert problems(validate(manifest, prompt="what of {caption}?")) == {}


@pytest.mark.parametrize("name", ["m.parquet", "m.jsonl"])
@pytest.mark.parametrize("kind", [int, str])
def test_ids(kind, name, tmp_path):
    ids = [kind(n - 5) for n in range(3000)]
    ids[2005], ids[2050], ids[2999], ids[2020] = ids[7], ids[2049], ids[7], None
    rows = [{"id": id, "prompt": f"q {n}"} for n, id in enumerate(ids)]
    report = validate(write(tmp_path / name, rows))
    assert problems(report, "error") == {"duplicate_id": [2005, 2050, 2999]}
    assert problems(report, "warning") == {"missing_id": [2020]}
    assert (report.exit_code, report.failing) == (3, 0)
    assert [example.id for example in report.problems[0].examples] == [kind(2), kind(2044), kind(2)]
    found = [example.found for example in report.problems[0].examples]
    assert found == ["same id as row 7", "same id as row 2049", "same id as row 2005"]
    assert (report.ids.rows, report.ids.distinct) == (2999, 2996)
    assert "except for the errors above" in str(report)


def test_digests_that_are_equal_by_chance_are_not_a_problem(tmp_path, monkeypatch):
    rows = [{"id": f"r{n % 90}", "prompt": f"q {n % 95}"} for n in range(100)]
    manifest = write(tmp_path / "m.jsonl", rows[:90])
    monkeypatch.setattr(survey, "hash", lambda value: 7, raising=False)
    report = validate(manifest)
    assert problems(report) == {}
    assert (report.ids.rows, report.ids.distinct) == (90, 90)


def test_rows_with_the_same_question(tmp_path):
    make_image(tmp_path / "a.png", 1)
    make_image(tmp_path / "b.png", 2)
    row = {"prompt": "what?", "images": ["a.png", "b.png"]}
    changes = [
        {},
        {"images": ["b.png", "a.png"]},
        {"prompt": ["what?", "why?"]},
        {"images": ["a.png"]},
        {"generation": {"max_new_tokens": 5}},
        {"id": "another"},
        {"prompt": "<IMAGE_TOKEN>what?"},
        {"generation": {"temperature": 1}},
        {"generation": {"temperature": 1}},
    ]
    rows = [row | change for change in changes]
    report = validate(write(tmp_path / "m.jsonl", rows))
    assert problems(report, "warning")["repeated_question"] == [5], "rows that are sampled have different seeds"
    assert report.problems[-1].examples[0].id == "another"


def test_rows_without_images_are_reported_if_others_have_some(tmp_path):
    make_image(tmp_path / "a.png", 1)
    rows = [{"prompt": "what?", "image": "a.png"}, {"prompt": "who?", "image": None}]
    assert problems(validate(write(tmp_path / "m.parquet", rows))) == {"no_image": [1]}
    assert problems(validate(write(tmp_path / "n.parquet", [{"prompt": "a"}, {"prompt": "b"}]))) == {}


@pytest.mark.parametrize("look_ahead", [0, 1, 16, 4096])
def test_the_number_of_reads_is_that_of_a_run(look_ahead, web, tmp_path):  # noqa: F811
    address, asked, _ = web
    images = [f"{address}/{number}.png" for number in random_images(300)]
    manifest = write(tmp_path / "m.jsonl", [{"prompt": f"q {n}", "image": url} for n, url in enumerate(images)])

    async def rows():
        for number, url in enumerate(images):
            yield Row(number, images=(WebImage(url),))

    async def count_groups():
        return len([group async for group in group_by_images(rows(), look_ahead)])

    report = validate(manifest, look_ahead=look_ahead, **LOOPBACK)
    assert not asked, "nothing is fetched"

    sharing = report.sharing
    assert (sharing.rows, sharing.sets, sharing.reads) == (300, 20, asyncio.run(count_groups()))
    assert (sharing.shared, sharing.repeated_reads) == (300 - sharing.reads, sharing.reads - 20)
    assert ("sort the manifest by image" in str(report)) == (look_ahead < 4096)


def test_a_probe_fetches_and_decodes(tmp_path):
    jpeg, large = make_image(tmp_path / "a.jpg", 1), make_image(tmp_path / "large.png", 2, (300, 200))
    (tmp_path / "page.png").write_bytes(b"<!DOCTYPE html><title>404</title>")

    async def probed(**options):
        async with FaultServer() as server:
            server.images["cat"] = jpeg.read_bytes()
            paths = [*(f"/image/cat?n={n}" for n in range(20)), "/status/404", "/html", "/empty", "/loop"]
            sources = [*map(server.url, paths), "a.jpg", "large.png", "page.png"]
            rows = [{"id": n, "prompt": f"q {n}", "images": [source]} for n, source in enumerate(sources)]
            manifest = write(tmp_path / "m.jsonl", [*rows, {"prompt": "no image", "images": []}])
            report = await asyncio.to_thread(validate, manifest, fetch_retries=0, **options)
            return report, server.requests.total()

    report, requests = asyncio.run(probed(probe=100, **LOOPBACK))
    probe = report.probe
    failed = {problem.code: [example.row for example in problem.examples] for problem in probe.problems}
    assert failed == {"http_status": [20], "not_an_image": [21, 26], "empty_image": [22], "too_many_redirects": [23]}
    assert (probe.rows, probe.failed, probe.images, probe.largest) == (27, 5, 22, (300, 200))
    assert (probe.pixels.least, probe.pixels.median, probe.pixels.greatest) == (1200, 1200, 60_000)
    assert probe.bytes.greatest in (jpeg.stat().st_size, large.stat().st_size)
    assert probe.seconds > 0
    assert probe.decode_seconds > 0
    assert (report.failing, report.exit_code) == (0, 3)
    assert "22 good images" in str(report)

    report, requests = asyncio.run(probed(probe=8, **LOOPBACK))
    assert report.probe.rows == 8
    assert 0 < requests <= 8 + 6

    report, requests = asyncio.run(probed(probe=100))
    assert (requests, report.failing) == (0, 24), "without --allow-private"
    assert (report.probe.rows, report.probe.failed) == (3, 1)
    assert not children()


def test_a_probe_is_the_same_for_the_same_seed(tmp_path):
    for number in range(60):
        make_image(tmp_path / f"{number}.png", number, (number + 1, 1))
    manifest = write(tmp_path / "m.parquet", [{"prompt": "?", "image": f"{number}.png"} for number in range(60)])
    first, again, other = (validate(manifest, probe=5, seed=seed).probe for seed in (1, 1, 2))
    assert (first.rows, first.images) == (5, 5)
    assert first.pixels == again.pixels != other.pixels


def test_secrets_in_urls_are_not_printed(tmp_path):
    secret = "http://me:hunter2@10.0.0.1/a.png?token=hunter2#hunter2"
    rows = [{"id": secret, "prompt": "what?", "image": secret}] * 2
    report = validate(write(tmp_path / "m.jsonl", rows))
    assert (report.failing, len(report.problems)) == (2, 2)
    assert "http://10.0.0.1/a.png?…" in str(report)
    assert "hunter2" not in str(report) + report.as_json()


def test_a_truncated_manifest_is_reported_with_the_rows_before(tmp_path):
    noise = random.Random(0)
    rows = [{"id": n % 400, "prompt": noise.randbytes(300).hex()} for n in range(5000)]
    manifest = write(tmp_path / "m.jsonl.gz", rows)
    manifest.write_bytes(manifest.read_bytes()[:-20_000])
    report = validate(manifest, probe=5)
    assert report.exit_code == 3
    assert "truncated" in report.unreadable
    assert 400 < report.rows < 5000
    assert problems(report) == {"duplicate_id": [400, 401, 402]}
    assert "cannot be read to its end" in str(report)
    manifest.write_bytes(gzip.compress(b"")[:5])
    with pytest.raises(ManifestError):
        validate(manifest)


async def test_in_a_running_event_loop(tmp_path):
    """As in a notebook."""
    assert validate(write(tmp_path / "m.jsonl", [{"prompt": "hi"}])).rows == 1


def test_options_that_a_run_rejects_are_rejected(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"prompt": "hi", "response": "ho"}])
    for options, words in (
        ({"prompt": "{town}"}, "{town}"),
        ({"keep": ["response"]}, "--keep response"),
        ({"image_root": "x"}, "--image-root"),
        ({"allow_private": ["home"]}, "'home'"),
        ({"probe": -1}, "--probe"),
        ({"prompt": " "}, "--prompt: is empty"),
        ({"velocity": 3}, "'velocity'"),
    ):
        with pytest.raises((OptionError, ManifestError), match=words.replace("{", r"\{")):
            validate(manifest, **options)


def test_a_shard_and_a_limit(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"id": n // 2, "prompt": f"q {n}"} for n in range(100)])
    assert problems(validate(manifest, shard="1/4")) == {"duplicate_id": [27, 29, 31]}
    assert validate(manifest, shard="1/4").rows == 25
    assert validate(manifest, limit=7).rows == 7


def test_the_command(tmp_path):
    manifest = write(tmp_path / "m.jsonl", [{"id": n, "prompt": f"q {n}"} for n in range(30)])
    command = [sys.executable, "-m", "batchvl", "validate", str(manifest)]
    result = shell(command)
    assert result.returncode == 0, result.stderr
    assert f"{manifest}: 30 rows in 1 JSONL file" in result.stdout
    assert not result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]

    # With the command line of a run, and its job file.
    (tmp_path / "job.toml").write_text('model = "shapes"\nprompt = "{town}"\n')
    result = shell([*command, "--config", str(tmp_path / "job.toml"), "-o", str(tmp_path / "out"), "--engine", "fake"])
    assert (result.returncode, result.stdout) == (2, "")
    assert "no column 'town'" in result.stderr

    write(manifest, [{"id": n % 29, "prompt": f"q {n}"} for n in range(30)])
    result = shell([*command, "--json"])
    report = json.loads(result.stdout)
    assert (result.returncode, report["exit_code"], report["rows"]) == (3, 3, 30)
    assert report["problems"][0]["examples"] == [{"row": 29, "id": 0, "found": "same id as row 0"}]


MEASURED = """
import sys, batchvl
report = batchvl.validate(sys.argv[1], quiet=True)
assert report.rows == int(sys.argv[2]) and report.exit_code == 0, report
# getrusage would count the process before exec, a copy of the one that runs the tests.
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_does_not_grow_with_the_manifest(tmp_path):
    """All ids, questions and images are different. The smaller manifest has more than one run of digests, and each row
    more than 100 bytes."""

    def peak(rows):
        schema = pa.schema([("id", pa.string()), ("prompt", pa.string()), ("image", pa.string())])
        with pq.ParquetWriter(tmp_path / "m.parquet", schema) as writer:
            for start in range(0, rows, 100_000):
                numbers = range(start, start + 100_000)
                columns = ([text.format(n) for n in numbers] for text in ("row-{}", "q {}", "http://example.org/{}"))
                writer.write_table(pa.table(dict(zip(schema.names, columns, strict=True)), schema))
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        measured = [sys.executable, "-c", MEASURED, str(tmp_path / "m.parquet"), str(rows)]
        done = subprocess.run(measured, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    small, large = peak(600_000), peak(1_500_000)
    assert large - small < 30, f"{small} MB, then {large} MB"
    assert large < 400
