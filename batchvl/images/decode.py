"""Encoded bytes to an RGB picture, strictly: what is cut off, damaged or too large is an error, never a grey field."""

from __future__ import annotations

import hashlib
import io
import warnings
import zlib
from collections.abc import Callable
from typing import TypeAlias

import PIL.Image
from PIL import ImageFile, features
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile

from .. import types as request
from ..config.options import ImageOptions
from ..errors import CorruptImage, NotAnImage, PrepareError, PrepareFailed, TooManyImages, TooManyPixels, TruncatedImage
from .rgb import to_rgb
from .sniff import ends_early, is_picture, looks_like

FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "PPM", "JPEG2000")
    if features.check({"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}.get(name, "pil"))
)
"""What is read, MPO as a JPEG. Pillow knows more formats; each is a decoder that a hostile file could aim at."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
}  # fmt: skip
_SIDEWAYS = {Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90}


def strict() -> None:
    """Makes Pillow refuse pictures that end early, and leaves the limit on pixels to `decode`.

    These are Pillow's globals, and engines change them when they are imported (LMDeploy makes cut-off pictures grey):
    `decode` calls this each time.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    PIL.Image.MAX_IMAGE_PIXELS = None


def check_count(pictures: int, limits: ImageOptions) -> None:
    """Raises TooManyPictures where a row has more than --max-images."""
    if pictures > limits.max_images:
        raise TooManyImages(f"{pictures} pictures in the row, at most {limits.max_images} are allowed (--max-images)")


def decode(
    data: bytes | memoryview, limits: ImageOptions, source: str, used: ResizeTarget | None = None
) -> tuple[PIL.Image.Image, request.Image]:  # fmt: skip
    """The picture as RGB, EXIF orientation applied, transparency on white, of an animation the first frame; and what
    the output says about it: sha256 and number of the encoded bytes, width and height in pixels.

    `source` is how messages call the picture. The picture carries no metadata any more, so nobody turns it twice.
    With --draft-decode a JPEG of which `used` needs fewer pixels is smaller than what the output says about it.

    Raises NotAPicture, TruncatedPicture, CorruptPicture, TooManyPixels (told by the header, before decoding), or
    PrepareFailed where the memory does not suffice; whatever Pillow raises ends as one of these.
    """
    strict()
    data = bytes(data)  # also so that nobody changes it while it is read
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata that does not matter here
            picture, (width, height) = _open(data, limits.max_image_pixels, used if limits.draft_decode else None)
    except PrepareError as error:
        raise type(error)(f"{source}: {error}") from None
    except MemoryError:
        raise PrepareFailed(f"{source}: decoding needs more memory than the image worker has") from None
    except Exception as error:
        raise _blame(data, error, source) from error
    return picture, request.Image(source, hashlib.sha256(data).hexdigest(), width, height, len(data))


def _open(data: bytes, max_pixels: int, used: ResizeTarget | None) -> tuple[PIL.Image.Image, tuple[int, int]]:
    """The picture, upright, and its width and height in the file."""
    with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width < 1 or height < 1:
            raise CorruptImage(f"its header says {width} x {height} pixels")
        if width * height > max_pixels:
            raise TooManyPixels(
                f"{width} x {height} pixels are {width * height:,}, more than --max-image-pixels {max_pixels:,}"
            )
        if image.format == "PNG":
            _check_sums(memoryview(data))
        size = turn = None
        if isinstance(image, JpegImageFile):
            turn = _turn(image)  # once: where it fails over broken EXIF, Pillow would tell something the next time
            size = (height, width) if turn in _SIDEWAYS else (width, height)
            if used is not None:
                draft(image, *size, used)
        image.load()
        picture = to_rgb(image)
        if size is None:
            turn = _turn(image)  # not before: a PNG may have its EXIF behind its pixels
        if turn is not None:
            picture = picture.transpose(turn)
        elif picture is image:
            picture = image._new(image.im)  # the plain class, without the file; `copy()` costs as much as decoding
    picture.info.clear()
    return picture, size or picture.size


def _check_sums(data: memoryview) -> None:
    """Pillow skips the checksums of a PNG's pixels, and what is damaged often decodes to something.

    Critical chunks (PNG specification, 5.3 and 5.4) count here; those of metadata are Pillow's business.
    """
    at = len(b"\x89PNG\r\n\x1a\n")
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        critical = not data[at + 4] & 0x20
        if (
            critical
            and end + 4 <= len(data)
            and zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big")
        ):
            raise CorruptImage(f"its chunk {bytes(data[at + 4 : at + 8])!r} has a wrong checksum")
        at = end + 4


def _turn(image: PIL.Image.Image) -> Transpose | None:
    """How the picture is to be turned upright. Broken EXIF says nothing about the pixels, and is ignored."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        return None


def _blame(data: bytes, error: Exception, source: str) -> PrepareError:
    """The row's error for an exception of Pillow, whose types and texts differ from decoder to decoder."""
    if not is_picture(data):
        return NotAnImage(f"{source}: found {looks_like(data)}, want a picture ({', '.join(FORMATS)})")
    reason = "" if isinstance(error, PIL.UnidentifiedImageError) else f": {type(error).__name__}: {error}"
    if ends_early(data) or isinstance(error, EOFError) or "truncated" in str(error).lower():
        return TruncatedImage(f"{source}: ends after {len(data):,} bytes, before the picture is whole{reason}")
    return CorruptImage(f"{source}: {len(data):,} bytes that cannot be decoded{reason}")


ResizeTarget: TypeAlias = Callable[[int, int], tuple[int, int] | None]
"""`Scaling.used`: of an upright picture's width and height, the width and height that are made of it."""
SCALES = (8, 4, 2)


def draft(image: JpegImageFile, width: int, height: int, used: ResizeTarget) -> None:
    """Has `image`, of which nothing is decoded yet, decoded at the least scale that `used` allows.

    width, height: as they are once the picture stands upright. Raises PrepareFailed where `used` does not work.
    """
    try:
        scale = choose_scale(width, height, used)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise PrepareFailed(f"--draft-decode: the model's size for {width} x {height} pixels: {said}") from error
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))  # the mode stays: `to_rgb` is for that


def choose_scale(width: int, height: int, used: ResizeTarget) -> int:
    """The largest of `SCALES` by which the picture can be divided so that no pixel is missed and the same size is made
    of it; 1 where there is none.

    libjpeg rounds up, so the aspect ratio changes a little, and with it perhaps the tiles that are chosen.
    """
    wanted = used(width, height)
    if wanted is None:
        return 1
    for scale in SCALES:
        enough = width // scale >= wanted[0] and height // scale >= wanted[1]
        if enough and used(-(-width // scale), -(-height // scale)) == wanted:
            return scale
    return 1
