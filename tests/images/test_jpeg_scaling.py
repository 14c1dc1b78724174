"""JPEGs decoded at a part of their scale: which one, what comes out, and that nothing broken gets through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from batchvl.config.options import ImageOptions, RunOptions
from batchvl.errors import PrepareError, PrepareFailed, TooManyPixels, TruncatedImage
from batchvl.images.decode import FORMATS, ResizeTarget, choose_scale, decode
from tests.images.test_decode import TURNED, encoded, picture

WHOLE, DRAFT = ImageOptions(), ImageOptions(draft_decode=True)


def always(width: int, height: int) -> ResizeTarget:
    """Of a model that makes this size of every picture."""
    return lambda *_: (width, height)


def never(width: int, height: int) -> tuple[int, int]:
    raise AssertionError("asked")


def photograph(size: tuple[int, int] = (640, 480)) -> Image.Image:
    """Colours that change slowly, and without symmetry."""
    return picture((8, 6)).resize(size, Image.Resampling.BICUBIC)


def likeness(image: Image.Image, whole: Image.Image) -> float:
    """The mean difference of 8-bit values between a draft and the same size made of the whole."""
    differences = ImageChops.difference(image, whole.resize(image.size, Image.Resampling.BOX)).tobytes()
    return sum(differences) / len(differences)


@pytest.mark.parametrize(
    ("size", "used", "scale"),
    [
        ((4000, 3000), (1792, 1344), 2), ((4000, 3000), (2000, 1500), 2), ((4000, 3000), (2001, 1500), 1),
        ((4000, 3000), (2000, 1501), 1), ((4000, 3000), (1000, 750), 4), ((4000, 3000), (500, 375), 8),
        ((4000, 3000), (10, 10), 8), ((3999, 2999), (500, 375), 4), ((1280, 960), (1344, 896), 1), ((7, 7), (1, 1), 4),
        ((1, 1), (1, 1), 1),
    ],
)  # fmt: skip
def test_scale(size: tuple[int, int], used: tuple[int, int], scale: int) -> None:
    assert choose_scale(*size, always(*used)) == scale


@pytest.mark.parametrize(
    ("used", "scale"),
    [
        (lambda width, height: (448, 448) if width * height > 500_000 else (448, 224), 4),
        (lambda width, height: (448, 360 if width == 500 else 350), 4),
        (lambda width, height: (width // 9, 1), 1),
        (lambda width, height: None, 1),
    ],
)
def test_a_scale_of_which_another_size_would_be_made_is_not_taken(used: ResizeTarget, scale: int) -> None:
    assert choose_scale(4000, 3000, used) == scale


@settings(max_examples=200, deadline=None)
@given(*[st.integers(1, 70)] * 4, st.sampled_from(["RGB", "L", "CMYK"]), st.booleans())
def test_never_smaller_than_what_is_used(
    width: int, height: int, wide: int, high: int, mode: str, progressive: bool
) -> None:
    data = encoded(picture((width, height)).convert(mode), "JPEG", progressive=progressive)
    image, told = decode(data, DRAFT, "it", always(wide, high))
    scale = choose_scale(width, height, always(wide, high))
    assert (told.width, told.height) == (width, height)
    assert image.mode == "RGB"
    assert image.size == (-(-width // scale), -(-height // scale))
    if scale == 1:
        assert image.tobytes() == decode(data, WHOLE, "it")[0].tobytes()
    else:
        assert image.width >= wide
        assert image.height >= high


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("scale", [2, 4, 8])
def test_it_shows_the_same(mode: str, scale: int) -> None:
    data = encoded(photograph().convert(mode), "JPEG", quality=95)
    image, told = decode(data, DRAFT, "it", always(640 // scale, 480 // scale))
    whole, expected = decode(data, WHOLE, "it")
    assert image.size == (640 // scale, 480 // scale)
    assert likeness(image, whole) < 2
    assert told == expected
    assert type(image) is Image.Image
    assert not image.info


def test_of_a_file_of_several_pictures_the_first() -> None:
    data = encoded(photograph(), "MPO", save_all=True, append_images=[Image.new("RGB", (640, 480))])
    image, _ = decode(data, DRAFT, "it", always(160, 120))
    assert image.size == (160, 120)
    assert likeness(image, photograph()) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_asked_and_told_of_the_upright_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = photograph().transpose(TURNED[orientation]) if orientation in TURNED else photograph()
    data = encoded(lying, "JPEG", exif=exif, quality=95)
    asked = []

    def used(width: int, height: int) -> tuple[int, int]:
        asked.append((width, height))
        return 320, 100

    image, told = decode(data, DRAFT, "it", used)
    assert asked == [(640, 480), (320, 240)]
    assert image.size == (320, 240)
    assert (told.width, told.height) == (640, 480)
    assert likeness(image, photograph()) < 2
    assert 0x0112 not in image.getexif()


def test_broken_exif_is_ignored() -> None:
    data = encoded(photograph(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40)
    assert decode(data, DRAFT, "it", always(80, 60))[0].size == (80, 60)


def test_off_by_default_and_part_of_an_answers_meaning() -> None:
    data = encoded(photograph(), "JPEG")
    assert decode(data, WHOLE, "it", never)[0].size == (640, 480)
    assert RunOptions().meaning()["draft_decode"] is False


def test_a_model_that_does_not_tell_gets_all_pixels() -> None:
    data = encoded(photograph(), "JPEG")
    whole = decode(data, WHOLE, "it")[0].tobytes()
    assert decode(data, DRAFT, "it")[0].tobytes() == whole
    assert decode(data, DRAFT, "it", lambda *_: None)[0].tobytes() == whole


@pytest.mark.parametrize("format", sorted(set(FORMATS) - {"JPEG"}))
def test_other_formats_come_whole(format: str) -> None:
    data = encoded(photograph(), format)
    assert decode(data, DRAFT, "it", never)[0].tobytes() == decode(data, WHOLE, "it")[0].tobytes()


def test_a_model_that_fails_over_a_size_is_not_the_files_fault() -> None:
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


SMALL = [encoded(picture((40, 24)), "JPEG", progressive=progressive) for progressive in (False, True)]


@settings(max_examples=500, deadline=None)
@given(
    st.sampled_from(SMALL),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=3),
    st.floats(0.5, 1.5),
    st.sampled_from([2, 4, 8]),
)
def test_as_strict_as_the_whole(data: bytes, changes: list[tuple[float, bytes]], kept: float, scale: int) -> None:
    for place, new in changes:
        at = int(place * len(data))
        data = data[:at] + new + data[at + len(new) :]
    data = data[: int(min(1, kept) * len(data))]
    assert failure(lambda: decode(data, DRAFT, "it", always(40 // scale, 24 // scale))) == failure(
        lambda: decode(data, WHOLE, "it")
    )


def failure(work: Callable[[], object]) -> type[PrepareError] | None:
    try:
        work()
    except PrepareError as error:
        return type(error)
    return None
