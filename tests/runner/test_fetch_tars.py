"""`batchvl fetch --format tar`: tars that others read as well, and what is said about those that are not whole."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import batchvl
from batchvl.errors import ManifestError, OptionError, ResumeError
from batchvl.results import image_writer

from ..manifest.writing import write
from .running import answers, image_digest, make_image, run

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "PPM": "pnm"}


def fetch(manifest: Path, output: Path, **options: Any) -> Any:
    settings = {"format": "tar", "quiet": True, "image_workers": 1, **options}
    return batchvl.fetch(manifest, output=output, **settings)


def pair(output: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return the only tar, and its rows in the order of the manifest."""
    [tar], [rows] = output.glob("*.tar"), output.glob("*.parquet")
    assert (tar.name, rows.name) == ("images-00000-0001-000001.tar", "rows-00000-0001-000001.parquet")
    return tar, pq.read_table(rows).sort_by("source_row").to_pylist()


def contents(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar, "r:") as file:
        members = file.getmembers()
        assert all(member.isreg() and (member.mtime, member.uid, member.mode) == (0, 0, 0o644) for member in members)
        assert len({member.name for member in members}) == len(members)
        return {member.name: file.extractfile(member).read() for member in members}  # type: ignore[union-attr]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Three questions about two images, one row with both, and one with none."""
    a, b = (make_image(tmp_path / "in" / f"{name}.png", number) for number, name in enumerate("ab"))
    lists = [[a.name], [b.name], [a.name], [a.name, b.name], []]
    rows = [{"id": f"r{n}", "prompt": f"q {n}", "images": images, "n": n / 2} for n, images in enumerate(lists)]
    return write(tmp_path / "in" / "m.jsonl", rows)


def test_each_row_is_a_sample_and_points_at_the_first_copy_of_its_images(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_writer, "GROUP_BYTES", 2000)  # two rows
    fetch(manifest, tmp_path / "out")
    tar, rows = pair(tmp_path / "out")
    a, b = ((manifest.parent / f"{name}.png").read_bytes() for name in "ab")
    members = contents(tar)
    assert {name: data for name, data in members.items() if not name.endswith(".json")} == {
        "000000000.png": a,
        "000000001.png": b,
        "000000002.png": a,
        "000000003.0.png": a,
        "000000003.1.png": b,
    }
    assert [json.loads(members[f"{row:09d}.json"]) for row in (1, 3, 4)] == [
        {"source_row": 1, "id": "r1", "prompt": "q 1", "n": 0.5, "source_images": ["b.png"]},
        {"source_row": 3, "id": "r3", "prompt": "q 3", "n": 1.5, "source_images": ["a.png", "b.png"]},
        {"source_row": 4, "id": "r4", "prompt": "q 4", "n": 2.0, "source_images": []},
    ]
    keys = [name.partition(".")[0] for name in members]
    assert [key for at, key in enumerate(keys) if key not in keys[:at]] == [
        key for at, key in enumerate(keys) if key != keys[at - 1] or not at
    ], "the members of a sample are together"
    assert len({path for row in rows for path in row["images"]}) == 2, "a run knows the same images by their paths"
    for row, images in zip(rows, ([a], [b], [a], [a, b], []), strict=True):
        assert [members[path.removeprefix(f"{tar.name}#")] for path in row["images"]] == images


def test_values_keep_their_types_in_parquet_and_are_readable_in_json(tmp_path: Path) -> None:
    make_image(tmp_path / "in" / "a.png", 1)
    columns = pa.table(
        {
            "u": pa.array([2**64 - 1, None], pa.uint64()),
            "price": pa.array([Decimal("1.20"), None]),
            "when": pa.array([1_700_000_000_123_456_789, None], pa.timestamp("ns", "UTC")),
            "day": pa.array([date(2026, 11, 29), None]),
            "raw": pa.array([b"\xff", None]),
            "tags": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
        }
    )
    manifest = tmp_path / "in" / "m.parquet"
    pq.write_table(columns.append_column("image", pa.array(["a.png", None])), manifest)
    fetch(manifest, tmp_path / "out")
    [tar] = (tmp_path / "out").glob("*.tar")
    rows = pq.read_table(next((tmp_path / "out").glob("*.parquet"))).sort_by("source_row")
    assert rows.drop_columns(["source_row", "image", "source_images"]).equals(columns)
    assert rows["image"].to_pylist() == [f"{tar.name}#000000000.png", None]
    assert json.loads(contents(tar)["000000000.json"]) == {
        "source_row": 0,
        "u": 2**64 - 1,
        "price": "1.20",
        "when": 1_700_000_000_123_456_789,
        "day": "2026-11-29",
        "raw": "/w==",
        "tags": [["a", 1]],
        "source_images": "a.png",
    }
    assert "000000001.json" in contents(tar)


def test_the_tar_command_lists_and_extracts_it(manifest: Path, tmp_path: Path) -> None:
    fetch(manifest, tmp_path / "out")
    tar, _ = pair(tmp_path / "out")
    members = contents(tar)
    listed = subprocess.run(["tar", "tf", tar], check=True, capture_output=True, text=True)
    assert (listed.stdout.split(), listed.stderr) == (list(members), "")
    (tmp_path / "extracted").mkdir()
    done = subprocess.run(["tar", "xf", tar, "-C", tmp_path / "extracted"], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert {path.name: path.read_bytes() for path in (tmp_path / "extracted").iterdir()} == members


def test_the_tars_are_a_manifest_themselves(manifest: Path, tmp_path: Path) -> None:
    """But a row without an image has none that a run could miss: here it fails."""
    fetch(manifest, tmp_path / "out")
    fake = {"images": True}
    there = {row["id"]: row["response"] for row in answers(run(manifest, fake, output=tmp_path / "there"))}
    rows = run(tmp_path / "out", fake, output=tmp_path / "rows")
    assert {row["id"]: row["response"] for row in answers(rows)} == there
    assert image_digest(manifest.parent / "b.png") in there["r1"]
    tars = run(tmp_path / "out" / "*.tar", fake, output=tmp_path / "tars", id_column="json_id")
    assert {row["id"]: row["response"] for row in answers(tars)} == {**there, "r4": None}
    assert tars.failures == {"invalid_row": 1}


def test_suffixes_say_what_an_image_is_whatever_its_source_was_called(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in FORMATS:
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name, name)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG2000", no_jp2=True)
    (tmp_path / "in" / "J2K").write_bytes(file.getvalue())
    expected = [*FORMATS.values(), "j2k"]
    manifest = write(tmp_path / "in" / "m.jsonl", [{"image": name} for name in (*FORMATS, "J2K")])
    assert fetch(manifest, tmp_path / "out").ok == 8
    tar, rows = pair(tmp_path / "out")
    assert [row["image"] for row in rows] == [f"{tar.name}#{n:09d}.{suffix}" for n, suffix in enumerate(expected)]
    assert run(tmp_path / "out" / "*.tar", output=tmp_path / "tars").ok == 8


def test_the_same_rows_make_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fetch(manifest, tmp_path / name, limit=1)
    assert pair(tmp_path / "one")[0].read_bytes() == pair(tmp_path / "two")[0].read_bytes()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_rows_whose_tar_is_not_whole_are_not_taken_for_fetched(damage: str, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch(manifest, out)
    tar, _ = pair(out)
    shutil.copy(tar, tmp_path / "safe")
    size = tar.stat().st_size
    if damage == "gone":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:-512])
    found = "none" if damage == "gone" else f"{size - 512:,} bytes"
    with pytest.raises(ResumeError, match=f"expected its images in {tar.name}, of {size:,} bytes, found {found}: put"):
        fetch(manifest, out)
    shutil.copy(tmp_path / "safe", tar)
    assert fetch(manifest, out).resumed == 5
    tar.unlink()
    next(out.glob("*.parquet")).unlink()
    assert (fetch(manifest, out).ok, len(list(out.glob("*.tar")))) == (5, 1)


def test_records_are_made_up_for_from_the_tar(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fetch(manifest, out)
    before = pq.read_table(out / "_fetch" / "results.parquet").to_pylist()
    shutil.rmtree(out / "_fetch")
    assert fetch(manifest, out).ok == 5
    after = pq.read_table(out / "_fetch" / "results.parquet").to_pylist()
    assert {row["file"] for row in after} == {pair(out)[0].name}
    for name in ("source", "sha256", "bytes"):
        assert [[image[name] for image in row["images"]] for row in after] == [
            [image[name] for image in row["images"]] for row in before
        ]


def test_the_format_of_a_directory_cannot_change(manifest: Path, tmp_path: Path) -> None:
    fetch(manifest, tmp_path / "out", limit=2)
    with pytest.raises(ResumeError, match='--format: "tar" there, "parquet" here'):
        fetch(manifest, tmp_path / "out", format="parquet")


def test_what_cannot_be_in_tars_is_refused(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="--format: expected parquet or tar; found 'zip'"):
        fetch(manifest, tmp_path / "out", format="zip")
    taken = write(tmp_path / "in" / "s.jsonl", [{"image": "a.png", "source_images": 1}])
    with pytest.raises(ManifestError, match="column 'source_images': fetch adds a column of this name"):
        fetch(taken, tmp_path / "out")
    assert fetch(taken, tmp_path / "out", format="parquet").ok == 1
