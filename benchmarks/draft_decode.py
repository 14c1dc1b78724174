"""Time saved by --draft-decode and its effect on pixels, for InternVL with tiles of 448 pixels.

    python benchmarks/draft_decode.py     # two minutes on one core; needs lmdeploy and no GPU

Each image is decoded and prepared like in an image worker, by LMDeploy's own code, alternately without and with the
option. Milliseconds are the minimum of nine, for decoding + preparing; on a shared machine only their ratio is
meaningful. The difference is that of the tiles' 8-bit values, before they are normalised. The images are synthetic: see
benchmarks/images.py.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in an image worker
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy  # noqa: E402

from batchvl.config.options import ImageOptions  # noqa: E402
from batchvl.engines.lmdeploy.preparation import LmdeployPreparation  # noqa: E402
from batchvl.images.decode import decode  # noqa: E402
from batchvl.types import ContentPart, Message, Request  # noqa: E402
from benchmarks import internvl  # noqa: E402
from benchmarks.images import photographs  # noqa: E402

SIZES = [(4000, 3000), (3999, 2999), (2000, 1500), (1280, 960)]
IMAGES = 3
"""Images per size."""
ROUNDS = 3
MAX_TILES = (12, 6, 1)
REQUEST = Request(0, (Message("user", (ContentPart(image=0), ContentPart("describe this image"))),))
MEAN, STD = (numpy.reshape(channels, (3, 1, 1)) for channels in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def make_chat_model(directory: Path, hf_model: Path) -> Path:
    """Write what LMDeploy needs to prepare images for InternVL-Chat-V1-5 to 3.5, with another model's tokenizer."""
    directory.mkdir()
    for file in hf_model.glob("*token*"):
        (directory / file.name).symlink_to(file)
    internvl.configure_chat(directory, {"image_size": internvl.TILE, "patch_size": 14}, {})
    return directory


def decode_and_prepare(
    preparation: LmdeployPreparation, jpeg: bytes, options: ImageOptions
) -> tuple[numpy.ndarray, int, float, float]:
    """Return the tiles, the decoded width, and the seconds of decoding and of preparing."""
    start = time.perf_counter()
    image, info = decode(jpeg, options, "image", preparation.resized_size)
    decoded = time.perf_counter()
    arrays = preparation.prepare(REQUEST, [image], [info])
    end = time.perf_counter()
    return arrays["0:float16"], image.width, decoded - start, end - decoded


def to_8_bits(tiles: numpy.ndarray) -> numpy.ndarray:
    return numpy.rint((tiles.astype(numpy.float32) * STD + MEAN) * 255)


def compare(
    form: str, preparation: LmdeployPreparation, max_tiles: int, jpegs: list[bytes], size: tuple[int, int]
) -> str:
    """Return a row of the table: images decoded in full against images decoded with the option."""
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    errors, widths = [], []
    for jpeg in jpegs * ROUNDS:
        tiles = {}
        for draft in (False, True):
            tiles[draft], width, *seconds = decode_and_prepare(preparation, jpeg, ImageOptions(draft_decode=draft))
            times[draft].append((seconds[0], seconds[1]))
        widths.append(width)
        whole, drafted = to_8_bits(tiles[False]), to_8_bits(tiles[True])
        assert whole.shape == drafted.shape
        errors.append((float(numpy.abs(whole - drafted).mean()), float(((whole - drafted) ** 2).mean())))
    [scale] = {round(size[0] / width) for width in widths}
    mean, square = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    whole_seconds, draft_seconds = (min(times[draft], key=sum) for draft in (False, True))
    psnr = f"{10 * math.log10(255**2 / square):.1f} dB" if square else ""
    grid = " x ".join(str(side // internvl.TILE) for side in preparation.resized_size(*size) or ())
    cells = [
        form,
        f"{size[0]} x {size[1]}",
        max_tiles,
        grid,
        f"1/{scale}" if scale > 1 else "whole",
        *(f"{decoding * 1e3:.0f} + {preparing * 1e3:.0f}" for decoding, preparing in (whole_seconds, draft_seconds)),
        f"{sum(whole_seconds) / sum(draft_seconds):.1f}",
        f"{mean:.2f}",
        psnr,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    logging.disable(logging.WARNING)  # LMDeploy's warnings would end up in the table
    print(
        "| form | image | max tiles | tiles | decoded | ms whole | ms draft | times faster | mean difference | PSNR |"
    )
    print("|" + " --- |" * 10)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        hf = internvl.make("tiny", directory / "hf")
        forms = {
            "`-hf`": (hf, "InternVLForConditionalGeneration"),
            "Chat": (make_chat_model(directory / "chat", hf), "InternVLChatModel"),
        }
        jpegs = {size: photographs(size, IMAGES) for size in SIZES}
        for form, (path, architecture) in forms.items():
            for max_tiles in MAX_TILES:
                preparation = LmdeployPreparation(
                    str(path), architecture, True, "float16", None, max_tiles, True, False
                )
                for size in SIZES:
                    print(compare(form, preparation, max_tiles, jpegs[size], size), flush=True)


if __name__ == "__main__":
    main()
