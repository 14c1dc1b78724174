"""Rows that share images: each image is fetched and prepared once, and each row has its own answer or failure."""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp.web import HTTPNotFound

from ..manifest.writing import write
from .running import answers, codes, image_digest, make_image, responses, run
from .test_answers import serving


@pytest.fixture
def web(tmp_path):
    """Serve images 0 to 19. Yields the address, the number of requests by name, and the files by name."""
    requests = Counter()
    files = {f"{number}.png": make_image(tmp_path / f"{number}.png", number) for number in range(20)}

    class Counting(dict):
        def __getitem__(self, name):
            requests[name] += 1
            if name not in self:
                raise HTTPNotFound
            return super().__getitem__(name)

    with serving(Counting({name: path.read_bytes() for name, path in files.items()})) as address:
        yield address, requests, files


def random_images(rows: int, seed: int = 7) -> list[int]:
    """Return the number of an image, 0 to 19, for each row."""
    rng = random.Random(seed)
    return [rng.randrange(20) for _ in range(rows)]


def test_each_image_is_fetched_once(web, tmp_path):
    address, requests, files = web
    numbers = random_images(200)
    rows = [{"prompt": f"q {n}", "image": f"{address}/{number}.png"} for n, number in enumerate(numbers)]
    manifest = write(tmp_path / "m.jsonl", rows)
    expected = [f"q {n} {image_digest(files[f'{number}.png'])}" for n, number in enumerate(numbers)]

    summary = run(manifest, image_workers=2, allow_private=["127.0.0.0/8"], arena_bytes="16MB", batch_size=8)
    assert responses(summary) == expected
    assert set(requests.values()) == {1}
    assert len(requests) == 20

    requests.clear()
    alone = run(manifest, output=tmp_path / "alone", look_ahead=0, allow_private=["127.0.0.0/8"])
    assert responses(alone) == expected
    assert set(requests.values()) == {1}, "also of rows that are no group"


def test_a_failed_image_fails_all_of_its_rows_and_a_bad_prompt_only_its_own(web, tmp_path):
    address, _, files = web
    rows = [
        {"prompt": "a", "image": f"{address}/0.png"},
        {"prompt": "b", "image": f"{address}/missing.png"},
        {"prompt": "<IMAGE_TOKEN> or <IMAGE_TOKEN>", "image": f"{address}/0.png"},
        {"prompt": "c", "image": f"{address}/missing.png"},
        {"prompt": "d", "image": f"{address}/0.png"},
    ]
    summary = run(write(tmp_path / "m.jsonl", rows), allow_private=["127.0.0.0/8"], fetch_retries=0)

    digest = image_digest(files["0.png"])
    assert responses(summary) == [f"a {digest}", None, None, None, f"d {digest}"]
    assert codes(summary) == {1: "http_status", 2: "image_count_mismatch", 3: "http_status"}
    failed = [row for row in answers(summary) if row["row"] in (1, 3)]
    assert [row["images"][0]["source"].endswith("missing.png") for row in failed] == [True, True]


def test_images_in_the_manifest_itself(tmp_path):
    data = [make_image(tmp_path / f"{number}.png", number).read_bytes() for number in range(2)]
    manifest = tmp_path / "m.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b", "c"], "image": [data[0], data[1], data[0]]}), manifest)

    digests = [image_digest(tmp_path / f"{number}.png") for number in (0, 1, 0)]
    assert responses(run(manifest)) == [f"{text} {digest}" for text, digest in zip("abc", digests, strict=True)]


def test_a_row_that_kills_the_engine_does_not_fail_rows_with_the_same_image(tmp_path):
    file = make_image(tmp_path / "a.png", 1)
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    rows = [{"prompt": f"q {n}", "image": url if n % 2 else "a.png"} for n in range(60)]

    summary = run(write(tmp_path / "m.jsonl", rows), {"die_on": [17]}, batch_size=8)

    assert responses(summary) == [None if n == 17 else f"q {n} {image_digest(file)}" for n in range(60)]
    assert codes(summary) == {17: "engine_crashed"}


def test_rows_that_fail_once_are_retried_with_their_images(tmp_path):
    file = make_image(tmp_path / "a.png", 1)
    rows = [{"prompt": f"q {n}", "image": "a.png"} for n in range(40)]

    summary = run(write(tmp_path / "m.jsonl", rows), {"flaky_every": 3}, arena_bytes="600KB")

    assert responses(summary) == [f"q {n} {image_digest(file)}" for n in range(40)]


def test_an_engine_that_takes_encoded_images_gets_the_original_bytes(web, tmp_path):
    address, requests, files = web
    numbers = random_images(60)
    rows = [{"prompt": f"q {n}", "image": f"{address}/{number}.png"} for n, number in enumerate(numbers)]
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(files["0.png"].read_bytes()[:60])
    rows.append({"prompt": "q 60", "image": "truncated.png"})

    summary = run(write(tmp_path / "m.jsonl", rows), {"encoded": True}, allow_private=["127.0.0.0/8"])

    digests = [hashlib.sha256(files[f"{number}.png"].read_bytes()).hexdigest()[:12] for number in numbers]
    assert responses(summary) == [*(f"q {n} {digest}" for n, digest in enumerate(digests)), None]
    assert codes(summary) == {60: "truncated_image"}
    assert set(requests.values()) == {1}
