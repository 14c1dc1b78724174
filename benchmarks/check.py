"""What it costs an image worker to decode an image, and only to check that it can be decoded.

    python benchmarks/check.py     # a minute and a half on one core

Milliseconds of CPU per image are the minimum of nine, each the mean of eight photographs of benchmarks/images.py, in
turn; on a shared machine only their ratio is meaningful.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from batchvl.config.options import ImageOptions  # noqa: E402
from batchvl.images.decode import check, decode  # noqa: E402
from benchmarks.images import photographs  # noqa: E402
from benchmarks.web_server import IMAGE_SIZE, PHOTOGRAPHS  # noqa: E402

SIZES = [IMAGE_SIZE, (4000, 3000)]
ROUNDS = 9


def encode(jpeg: bytes, format: str, **options: object) -> bytes:
    """Return an image in another format."""
    file = io.BytesIO()
    Image.open(io.BytesIO(jpeg)).save(file, format, **options)
    return file.getvalue()


def cpu_ms(work: Callable[[bytes, ImageOptions, str], object], images: list[bytes]) -> float:
    """Return the mean milliseconds of CPU per image."""
    started = time.process_time()
    for image in images:
        work(image, ImageOptions(), "image")
    return (time.process_time() - started) / len(images) * 1e3


def main() -> None:
    print("| image | KB | decoded, ms | checked, ms |")
    print("|" + " --- |" * 4)
    for size in SIZES:
        jpegs = photographs(size, PHOTOGRAPHS)
        forms = {
            "JPEG": jpegs,
            "progressive JPEG": [encode(jpeg, "JPEG", quality=87, progressive=True) for jpeg in jpegs],
            "WebP": [encode(jpeg, "WEBP", quality=87) for jpeg in jpegs],
        }
        for form, images in forms.items():
            times = [(cpu_ms(decode, images), cpu_ms(check, images)) for _ in range(ROUNDS)]
            decoded, checked = (min(column) for column in zip(*times, strict=True))
            kilobytes = sum(map(len, images)) / len(images) / 1e3
            print(f"| {form}, {size[0]} x {size[1]} | {kilobytes:,.0f} | {decoded:.1f} | {checked:.1f} |", flush=True)


if __name__ == "__main__":
    main()
