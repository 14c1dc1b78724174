"""Decoding images to RGB, strictly: a truncated, corrupt or too large image is an error, never a gray area.

JPEGs can be decoded at 1/2, 1/4 or 1/8 of their size: large ones if the model would shrink them anyway
(--draft-decode), and all if nobody needs the pixels.
"""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import PIL.Image
from PIL import ImageFile, features
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile

from ..config.options import ImageOptions
from ..errors import CorruptImage, NotAnImage, PrepareError, PrepareFailed, TooManyPixels, TruncatedImage
from ..fetching.sniff import describe, ends_early, is_image
from ..types import Image
from .rgb import to_rgb

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
    if features.check({"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(name, "pil"))
)
"""Formats that are read; MPO as JPEG. Pillow knows more, but each is a decoder that a hostile file could attack."""

SCALES = (8, 4, 2)
"""Divisors at which libjpeg can decode, largest first."""

ResizeTarget: TypeAlias = Callable[[int, int], tuple[int, int] | None]
"""`Scaling.resized_size`: maps the width and height of an upright image to those that it is resized to."""

_Draft: TypeAlias = Callable[[JpegImageFile, int, int], None]
"""Chooses at which scale a JPEG is decoded, before any of it is. Gets the upright image's width and height as well."""

_ORIENTATION = 0x0112
_TO_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""By the EXIF orientation."""
_SWAPS_SIDES = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}


def configure_pillow() -> None:
    """Make Pillow reject truncated images, and leave the limit on pixels to `decode`.

    These are globals of Pillow that engines change when they are imported: LMDeploy fills truncated images with gray.
    `decode` therefore calls this each time.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PIL.Image.MAX_IMAGE_PIXELS = None


def decode(
    data: bytes | memoryview, limits: ImageOptions, source: str, resize_target: ResizeTarget | None = None
) -> tuple[PIL.Image.Image, Image]:
    """Decode an image, upright and on white where it is transparent. Of an animation, decode the first frame.

    Args:
        data: Encoded bytes.
        limits: What is allowed.
        source: Label of the image in messages and in the output.
        resize_target: What the image will be resized to. With --draft-decode, a JPEG that is much larger is decoded at
            a smaller scale.

    Returns:
        The image in mode RGB, without metadata, so that nobody rotates it again; and the image's record for the
        output: hash and number of the encoded bytes, and its full width and height.

    Raises:
        NotAnImage, TruncatedImage, CorruptImage: The bytes cannot be decoded.
        TooManyPixels: The header says that the image is too large.
        PrepareFailed: Memory does not suffice.
    """
    draft = partial(_draft_for_target, resize_target) if limits.draft_decode and resize_target else None
    return _load(data, limits, source, draft)


def check(data: bytes | memoryview, limits: ImageOptions, source: str) -> Image:
    """Check that `decode` can decode an image. For a JPEG this takes less time: two thirds, or half if it is large.

    libjpeg reads all of a JPEG's bits at any scale. What it leaves out at 1/8 and without colors is arithmetic that
    cannot fail.

    Args:
        data: Encoded bytes.
        limits: What is allowed.
        source: Label of the image in messages and in the output.

    Returns:
        The image's record for the output, as `decode` returns it.

    Raises:
        NotAnImage, TruncatedImage, CorruptImage, TooManyPixels, PrepareFailed: As `decode`.
    """
    return _load(data, limits, source, _draft_for_check)[1]


def _load(
    data: bytes | memoryview, limits: ImageOptions, source: str, draft: _Draft | None
) -> tuple[PIL.Image.Image, Image]:
    """Decode an image; see `decode`."""
    configure_pillow()
    data = bytes(data)  # also so that nobody changes it while it is read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about metadata
            image, (width, height) = _decode(data, limits, draft)
    except PrepareError as error:
        raise type(error)(f"{source}: {error}") from None
    except MemoryError:
        raise PrepareFailed(f"{source}: decoding needs more memory than an image worker has") from None
    except Exception as error:
        raise _classify(data, error, source) from error
    return image, Image(source, hashlib.sha256(data).hexdigest(), width, height, len(data))


def _decode(data: bytes, limits: ImageOptions, draft: _Draft | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """Return the upright image, and its full width and height."""
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as file:
        _check_size(*file.size, limits.max_image_pixels)
        if file.format == "PNG":
            _check_png_checksums(memoryview(data))
        if isinstance(file, JpegImageFile):
            rotation = _rotation(file)  # once: if broken EXIF makes it fail, Pillow returns something the next time
            full_size = file.size[::-1] if rotation in _SWAPS_SIDES else file.size
            if draft is not None:
                draft(file, *full_size)
            file.load()
        else:
            file.load()
            rotation = _rotation(file)  # only now: the EXIF of a PNG may follow its pixels
            full_size = None
        image = to_rgb(file)
        if rotation is not None:
            image = image.transpose(rotation)
        elif image is file:
            image = image._new(image.im)  # detaches the pixels from the file; `copy()` costs as much as decoding
    image.info.clear()
    return image, full_size or image.size


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise CorruptImage(f"its header says {width} x {height} pixels")
    if width * height > max_pixels:
        raise TooManyPixels(
            f"{width} x {height} pixels are {width * height:,}, more than --max-image-pixels {max_pixels:,}"
        )


def _check_png_checksums(data: memoryview) -> None:
    """Raise CorruptImage if a critical chunk has a wrong checksum.

    Pillow skips the checksums of a PNG's pixels, and damaged pixels often decode to something. Critical chunks: PNG
    specification, sections 5.3 and 5.4.
    """
    start = len(b"\x89PNG\r\n\x1a\n")
    while start + 12 <= len(data):
        name = data[start + 4 : start + 8]
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        is_critical = not name[0] & 0x20
        if is_critical and end + 4 <= len(data):
            checksum = int.from_bytes(data[end : end + 4], "big")
            if zlib.crc32(data[start + 4 : end]) != checksum:
                raise CorruptImage(f"its chunk {bytes(name)!r} has a wrong checksum")
        start = end + 4


def _rotation(image: PIL.Image.Image) -> Transpose | None:
    """Return what makes the image upright. Broken EXIF says nothing about the pixels and is ignored."""
    try:
        return _TO_UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


def _draft_for_target(resize_target: ResizeTarget, image: JpegImageFile, width: int, height: int) -> None:
    """Choose the smallest scale that `resize_target` allows. Raises PrepareFailed if `resize_target` fails."""
    try:
        scale = choose_scale(width, height, resize_target)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise PrepareFailed(f"--draft-decode: the model's size for {width} x {height} pixels: {cause}") from error
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))  # None: `to_rgb` sees to the mode


def _draft_for_check(image: JpegImageFile, width: int, height: int) -> None:
    """Choose what takes the least arithmetic: the smallest scale, without colors."""
    image.draft("L", (max(1, image.width // SCALES[0]), max(1, image.height // SCALES[0])))


def choose_scale(width: int, height: int, resize_target: ResizeTarget) -> int:
    """Return the largest of `SCALES` at which an upright image still has all pixels that its resized version needs.

    The size that it is resized to must stay the same. libjpeg rounds up, so the aspect ratio changes a little, and with
    it perhaps the tiles that a model chooses. Returns 1 if no scale will do.
    """
    target = resize_target(width, height)
    if target is None:
        return 1
    for scale in SCALES:
        is_enough = width // scale >= target[0] and height // scale >= target[1]
        if is_enough and resize_target(-(-width // scale), -(-height // scale)) == target:
            return scale
    return 1


def _classify(data: bytes, error: Exception, source: str) -> PrepareError:
    """Return the row's error for an exception of Pillow, whose types and texts differ from decoder to decoder."""
    if not is_image(data):
        return NotAnImage(f"{source}: found {describe(data)}, expected an image ({', '.join(FORMATS)})")
    reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f": {type(error).__name__}: {error}"
    if ends_early(data) or isinstance(error, EOFError) or "truncated" in str(error).lower():
        return TruncatedImage(f"{source}: ends after {len(data):,} bytes, before the image is complete{reason}")
    return CorruptImage(f"{source}: {len(data):,} bytes that cannot be decoded{reason}")
