"""Values that cannot be meant are refused before anything is run, in a line that says what is wanted."""

import pytest

import batchvl
from batchvl.errors import ManifestError, OptionError

from .running import codes, picture, questions, run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 10**12}, "--batch-size: want a whole number <= 65536"),
        ({"seed": 10**23}, "--seed"),
        ({"max_images": 10**20}, "--max-images"),
        ({"limit": 10**12}, "--limit"),
        ({"temperature": float("inf")}, "--temperature"),
        ({"stop": [""]}, "--stop: found an empty string"),
        ({"accept_failures": "0.5"}, "--accept-failures: '0.5' is no bound"),
        ({"accept_failures": "200%"}, "--accept-failures: '200%' is no bound"),
        ({"max_image_bytes": 0}, "--max-image-bytes: 0 is no size"),
        ({"commit_seconds": "99999999999d"}, "--commit-seconds"),
        ({"arena_bytes": "1000000GB"}, "--arena-bytes"),
        ({"image_root": "nowhere"}, "--image-root: nowhere is no folder"),
    ],
)
def test_what_cannot_be_meant(options, words, tmp_path):
    manifest = questions(tmp_path / "m.jsonl", 3)
    with pytest.raises(OptionError) as refused:
        run(manifest, **options)
    assert words in str(refused.value)
    assert not (tmp_path / "m-batchvl").exists()


@pytest.mark.parametrize("manifest", [["x"], b"x", 3])
def test_a_manifest_is_a_path(manifest):
    with pytest.raises(batchvl.BatchvlError, match="path or a glob"):
        batchvl.run(manifest, engine="fake")


def test_a_stray_quote_in_csv_swallows_no_row_in_silence(tmp_path):
    (tmp_path / "open.csv").write_text('id,prompt\n1,a\n2,"unterminated\n3,c\n4,d\n')
    (tmp_path / "inside.csv").write_text('id,prompt\n1,a\n2,"say "hi" to\n3,c\n4,d\n')
    assert codes(run(tmp_path / "open.csv")) == {1: "invalid_row"}
    assert codes(run(tmp_path / "inside.csv")) == {1: "invalid_row"}


def test_a_dangling_link_among_pictures_is_a_failed_row(tmp_path):
    picture(tmp_path / "pictures/a.png", 1)
    (tmp_path / "pictures/b.png").symlink_to("gone")
    assert codes(run(tmp_path / "pictures")) == {1: "missing_file"}


def test_no_manifest_at_all(tmp_path):
    with pytest.raises(ManifestError, match="no such file"):
        run(tmp_path / "none.jsonl")
