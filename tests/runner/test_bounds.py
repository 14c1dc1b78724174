"""Impossible values are errors before anything runs, and the message says what is expected."""

import pytest

import batchvl
from batchvl.errors import ManifestError, OptionError

from .running import codes, make_image, questions, run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 10**12}, "--batch-size: expected a whole number <= 65536"),
        ({"seed": 10**23}, "--seed"),
        ({"max_images": 10**20}, "--max-images"),
        ({"limit": 10**12}, "--limit"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"stop": [""]}, "--stop: found an empty string"),
        ({"accept_failures": "0.5"}, "expected a number (100) or a percentage (1%) of rows; found '0.5'"),
        ({"accept_failures": "200%"}, "expected a number (100) or a percentage (1%) of rows; found '200%'"),
        ({"max_image_bytes": 0}, "--max-image-bytes: expected a size, such as 500000 (bytes), 32MB or 4GiB; found 0"),
        ({"commit_seconds": "99999999999d"}, "--commit-seconds"),
        ({"arena_bytes": "1000000GB"}, "--arena-bytes"),
        ({"image_root": "nowhere"}, "--image-root: nowhere is not a directory"),
    ],
)
def test_impossible_options_are_errors(options, message, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 3)
    with pytest.raises(OptionError) as error:
        run(manifest, **options)
    assert message in str(error.value)
    assert not (tmp_path / "m-batchvl").exists()


@pytest.mark.parametrize("manifest", [["x"], b"x", 3])
def test_a_manifest_must_be_a_path(manifest):
    with pytest.raises(batchvl.BatchvlError, match="path or a glob"):
        batchvl.run(manifest, engine="fake")


def test_a_stray_quote_in_csv_fails_its_row(tmp_path):
    (tmp_path / "open.csv").write_text('id,prompt\n1,a\n2,"unterminated\n3,c\n4,d\n')
    (tmp_path / "inside.csv").write_text('id,prompt\n1,a\n2,"say "hi" to\n3,c\n4,d\n')
    assert codes(run(tmp_path / "open.csv")) == {1: "invalid_row"}
    assert codes(run(tmp_path / "inside.csv")) == {1: "invalid_row"}


def test_a_dangling_link_among_images_fails_its_row(tmp_path):
    make_image(tmp_path / "images/a.png", 1)
    (tmp_path / "images/b.png").symlink_to("gone")
    assert codes(run(tmp_path / "images")) == {1: "missing_file"}


def test_a_missing_manifest_is_an_error(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        run(tmp_path / "none.jsonl")
