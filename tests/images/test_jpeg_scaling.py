"""JPEGs decoded at a smaller scale: which scale, what the result is, and that no broken file passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from batchvl.config.options import ImageOptions, RunOptions
from batchvl.errors import PrepareError, PrepareFailed, TooManyPixels, TruncatedImage
from batchvl.images.decode import FORMATS, ResizeTarget, check, choose_scale, decode
from tests.fuzzing import examples
from tests.images.drawing import STORED, drawing, encoded

FULL, DRAFT = ImageOptions(), ImageOptions(draft_decode=True)


def always(width: int, height: int) -> ResizeTarget:
    """Return the resize target of a model that resizes every image to this size."""
    return lambda *_: (width, height)


def never(width: int, height: int) -> tuple[int, int]:
    raise AssertionError("must not be called")


def photograph(size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Return an image without symmetry whose colors change slowly."""
    return drawing((8, 6)).resize(size, Image.Resampling.BICUBIC)


def mean_difference(image: Image.Image, full: Image.Image) -> float:
    """Return the mean difference of 8-bit values between an image and the full image at the same size."""
    differences = ImageChops.difference(image, full.resize(image.size, Image.Resampling.BOX)).tobytes()
    return sum(differences) / len(differences)


@pytest.mark.parametrize(
    ("size", "target", "scale"),
    [
        ((4000, 3000), (1792, 1344), 2),
        ((4000, 3000), (2000, 1500), 2),
        ((4000, 3000), (2001, 1500), 1),
        ((4000, 3000), (2000, 1501), 1),
        ((4000, 3000), (1000, 750), 4),
        ((4000, 3000), (500, 375), 8),
        ((4000, 3000), (10, 10), 8),
        ((3999, 2999), (500, 375), 4),
        ((1280, 960), (1344, 896), 1),
        ((7, 7), (1, 1), 4),
        ((1, 1), (1, 1), 1),
    ],
)
def test_the_largest_divisor_that_leaves_enough_pixels_is_chosen(
    size: tuple[int, int], target: tuple[int, int], scale: int
) -> None:
    assert choose_scale(*size, always(*target)) == scale


@pytest.mark.parametrize(
    ("resize_target", "scale"),
    [
        (lambda width, height: (448, 448) if width * height > 500_000 else (448, 224), 4),
        (lambda width, height: (448, 360 if width == 500 else 350), 4),
        (lambda width, height: (width // 9, 1), 1),
        (lambda width, height: None, 1),
    ],
)
def test_a_scale_that_changes_the_resized_size_is_not_chosen(resize_target: ResizeTarget, scale: int) -> None:
    assert choose_scale(4000, 3000, resize_target) == scale


@settings(max_examples=examples(200), deadline=None)
@given(*[st.integers(1, 70)] * 4, st.sampled_from(["RGB", "L", "CMYK"]), st.booleans())
def test_the_result_is_never_smaller_than_the_resized_size(
    width: int, height: int, target_width: int, target_height: int, mode: str, progressive: bool
) -> None:
    data = encoded(drawing((width, height)).convert(mode), "JPEG", progressive=progressive)
    target = always(target_width, target_height)
    image, info = decode(data, DRAFT, "it", target)
    scale = choose_scale(width, height, target)
    assert (info.width, info.height) == (width, height)
    assert image.mode == "RGB"
    assert image.size == (-(-width // scale), -(-height // scale))
    if scale == 1:
        assert image.tobytes() == decode(data, FULL, "it")[0].tobytes()
    else:
        assert image.width >= target_width
        assert image.height >= target_height


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_the_result_looks_the_same(mode: str, scale: int) -> None:
    data = encoded(photograph().convert(mode), "JPEG", quality=95)
    image, info = decode(data, DRAFT, "it", always(640 // scale, 480 // scale))
    full, full_info = decode(data, FULL, "it")
    assert image.size == (640 // scale, 480 // scale)
    assert mean_difference(image, full) < 2
    assert info == full_info
    assert type(image) is Image.Image
    assert not image.info


def test_the_first_image_of_a_file_is_decoded() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[Image.new("RGB", (640, 480))])
    image, _ = decode(data, DRAFT, "it", always(160, 120))
    assert image.size == (160, 120)
    assert mean_difference(image, photograph()) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_the_upright_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = photograph().transpose(STORED[orientation]) if orientation in STORED else photograph()
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    calls = []

    def resize_target(width: int, height: int) -> tuple[int, int]:
        calls.append((width, height))
        return 320, 100

    image, info = decode(data, DRAFT, "it", resize_target)
    assert calls == [(640, 480), (320, 240)]
    assert image.size == (320, 240)
    assert (info.width, info.height) == (640, 480)
    assert mean_difference(image, photograph()) < 2
    assert 0x0112 not in image.getexif()


def test_broken_exif_is_ignored() -> None:
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40)
    assert decode(data, DRAFT, "it", always(80, 60))[0].size == (80, 60)


def test_scaling_is_off_by_default_and_part_of_the_meaning_of_a_run() -> None:
    data = encoded(photograph(), "JPEG")
    assert decode(data, FULL, "it", never)[0].size == (640, 480)
    assert RunOptions().meaning()["draft_decode"] is False


def test_a_model_without_a_known_size_gets_all_pixels() -> None:
    data = encoded(photograph(), "JPEG")
    full = decode(data, FULL, "it")[0].tobytes()
    assert decode(data, DRAFT, "it")[0].tobytes() == full
    assert decode(data, DRAFT, "it", lambda *_: None)[0].tobytes() == full


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"JPEG"}))
def test_other_formats_are_decoded_at_full_size(format: str) -> None:
    data = encoded(photograph(), format)
    assert decode(data, DRAFT, "it", never)[0].tobytes() == decode(data, FULL, "it")[0].tobytes()


def test_a_model_that_fails_for_a_size_does_not_make_the_file_corrupt() -> None:
    def broken(width: int, height: int) -> tuple[int, int]:
        raise TypeError("no such argument")

    with pytest.raises(PrepareFailed, match=r"^it: --draft-decode: .* 640 x 480 .* no such argument"):
        decode(encoded(photograph(), "JPEG"), DRAFT, "it", broken)


def test_too_many_pixels() -> None:
    limits = ImageOptions(draft_decode=True, max_image_pixels=640 * 480 - 1)
    with pytest.raises(TooManyPixels):
        decode(encoded(photograph(), "JPEG"), limits, "it", never)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kept", [0.999, 0.95, 0.6, 0.3])
def test_truncated(kept: float, progressive: bool) -> None:
    data = encoded(photograph(), "JPEG", progressive=progressive)
    with pytest.raises(TruncatedImage, match=r"^it: ends after [0-9,]+ bytes"):
        decode(data[: int(len(data) * kept)], DRAFT, "it", always(80, 60))


SMALL = [encoded(drawing((40, 24)), "JPEG", progressive=progressive) for progressive in (False, True)]


@settings(max_examples=examples(500), deadline=None)
@given(
    st.sampled_from(SMALL),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=3),
    st.floats(0.5, 1.5),
    st.sampled_from([2, 4, 8]),
)
def test_scaled_decoding_is_as_strict_as_full_decoding(
    data: bytes, changes: list[tuple[float, bytes]], kept: float, scale: int
) -> None:
    for position, new in changes:
        start = int(position * len(data))
        data = data[:start] + new + data[start + len(new) :]
    data = data[: int(min(1, kept) * len(data))]
    full = failure(lambda: decode(data, FULL, "it"))
    assert failure(lambda: decode(data, DRAFT, "it", always(40 // scale, 24 // scale))) == full
    assert failure(lambda: check(data, FULL, "it")) == full


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("size", [(640, 480), (64, 48), (9, 7), (7, 9), (1, 1)])
def test_the_record_of_a_checked_image_is_that_of_a_decoded_one(format: str, size: tuple[int, int]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if format in ("JPEG", "PNG", "TIFF", "WEBP") else {}
    data = encoded(drawing(size), format, **options)
    assert check(data, FULL, "it") == decode(data, FULL, "it")[1]


@pytest.mark.parametrize("format", FORMATS)
def test_a_check_is_as_strict_as_decoding(format: str) -> None:
    data = encoded(drawing(), format)
    with pytest.raises(TooManyPixels):
        check(data, ImageOptions(max_image_pixels=64 * 48 - 1), "it")
    with pytest.raises(TruncatedImage, match=r"^it: ends after [0-9,]+ bytes"):
        check(data[: len(data) // 2], FULL, "it")


def failure(work: Callable[[], object]) -> type[PrepareError] | None:
    try:
        work()
    except PrepareError as error:
        return type(error)
    return None
