"""For any manifest, rows are complete and in order, values are right, and no error but ManifestError is raised."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from batchvl.config.options import ManifestOptions, PromptOptions, SamplingOptions
from batchvl.config.units import Shard
from batchvl.errors import ManifestError, PromptError
from batchvl.manifest import Manifest
from batchvl.prompts.prompter import Prompter
from batchvl.types import Row
from tests.fuzzing import examples
from tests.manifest.writing import numbers

ODD = (
    "{x}",
    "{{prompt}}",
    "{}",
    '{"a": {b}}',
    "<IMAGE_TOKEN>",
    "<|im_end|>",
    "\u2028",
    "\0",
    "é\u0301",
    "😀",
    "\r\n",
    '"',
)
odd = st.sampled_from(ODD)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.lists(odd, max_size=3).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
sources = st.none() | texts | st.just("https://example.org/a.jpg") | st.just("data:image/png;base64,AAEC")
good_rows = st.fixed_dictionaries(
    {
        "id": st.none() | texts,
        "prompt": st.none() | texts,
        "images": st.none() | st.lists(sources, max_size=3),
        "k": st.none() | texts,
    }
)
columns = st.sampled_from(["id", "prompt", "messages", "images", "image", "generation", "k"])
any_rows = st.dictionaries(columns, values, max_size=7)
quick = settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read(path: Path, shards: int = 1, **options: Any) -> list[Row]:
    manifest = Manifest.open(path, ManifestOptions(**options), PromptOptions(prompt="{prompt} {k}"))
    return [row for at in range(shards) for rows in manifest.rows(Shard(at, shards)) for row in rows]


@quick
@given(st.lists(good_rows, min_size=1, max_size=30), st.integers(1, 5))
def test_jsonl_and_parquet_and_their_shards_agree(rows: list[dict[str, Any]], shards: int) -> None:
    kinds = {"id": pa.string(), "prompt": pa.string(), "images": pa.list_(pa.string()), "k": pa.string()}
    # Without a string among its first ids, JSONL has no ids at all.
    rows = [{**rows[0], "id": "first"}, *rows]
    with tempfile.TemporaryDirectory() as directory:
        parquet, jsonl = Path(directory) / "m.parquet", Path(directory) / "m.jsonl"
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(kinds)), parquet, row_group_size=7)
        jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = read(parquet, keep=("k",))
        assert (
            found == read(jsonl, keep=("k",)) == read(jsonl, shards, keep=("k",)) == read(parquet, shards, keep=("k",))
        )
    assert numbers(found) == list(range(len(rows)))
    for row, written in zip(found, rows, strict=True):
        assert (row.id, row.kept["k"], row.columns["k"]) == (written["id"], written["k"], written["k"])
        if row.failure is None:
            assert row.prompt == (written["prompt"] or "")
            assert len(row.images) == sum(image is not None for image in written["images"] or ())


@quick
@given(st.lists(any_rows | values, min_size=1, max_size=20), st.booleans())
def test_any_json_becomes_a_right_row_or_a_failed_one(rows: list[Any], ascii_only: bool) -> None:
    rows = [{"prompt": "p", "k": "x"}, *rows, *[{"prompt": "p"}] * len(rows)]
    prompter = Prompter(PromptOptions(), SamplingOptions(), ["<|im_end|>"])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "m.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), newline="")
        found = read(path)
    assert numbers(found) == list(range(len(rows)))
    for row, written in zip(found, rows, strict=True):
        if row.failure is None:
            assert isinstance(written, dict)
            assert row.prompt in (written.get("prompt"), "")
            assert row.columns["k"] == written.get("k")
            try:
                assert prompter.request(row).row == row.number
            except PromptError:
                pass


@quick
@given(st.lists(st.binary(max_size=30), max_size=8), st.sampled_from(["m.jsonl", "m.csv"]))
def test_any_bytes_below_good_rows_fail_alone(lines: list[bytes], name: str) -> None:
    lines = [line.replace(b"\n", b"") for line in lines]
    good = [b'{"prompt": "p", "k": "x"}'] * 9 if name == "m.jsonl" else [b"prompt,k", *[b"p,x"] * 9]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(b"\n".join([*good, *lines]))
        found = read(path)
        assert read(path, 3) == found
    assert [row.prompt for row in found[:9]] == ["p"] * 9
    assert numbers(found) == list(range(len(found)))
    assert name == "m.csv" or len(found) == 9 + sum(bool(line.strip(b" \t\r\v\f")) for line in lines)


@quick
@given(st.binary(max_size=60), st.sampled_from(["m.jsonl", "m.csv", "m.parquet", "m.jsonl.gz", "m.csv.zst"]))
def test_any_bytes_as_a_manifest_are_read_or_rejected(data: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(data)
        try:
            manifest = Manifest.open(path, ManifestOptions(), PromptOptions())
            manifest.check()
            rows = list(manifest.rows())
        except ManifestError as error:
            assert str(path) in str(error)  # noqa: PT017
        else:
            assume(rows)
