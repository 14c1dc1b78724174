"""What --draft-decode saves, and what it changes: pictures decoded and prepared for InternVL with tiles of 448 pixels.

    python benchmarks/draft.py            # two minutes on one core; needs lmdeploy, and no GPU

Each picture is decoded and prepared as image workers do it, by LMDeploy's own code, without and with the option by
turns. Milliseconds are the least of nine times, decoding + preparing; on a shared machine only their ratio counts. The
difference is of the tiles' 8-bit values, as the model sees them but for their normalisation. The pictures are drawn:
see benchmarks/pictures.py.
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
PICTURES = 3
ROUNDS = 3
MAX_TILES = (12, 6, 1)
ASK = Request(0, (Message("user", (ContentPart(image=0), ContentPart("describe this image"))),))
MEAN, STD = (numpy.reshape(three, (3, 1, 1)) for three in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def classic(folder: Path, made: Path) -> Path:
    """A folder that LMDeploy prepares pictures by as for InternVL-Chat-V1-5 to 3.5; its tokenizer is `made`'s."""
    folder.mkdir()
    for file in made.glob("*token*"):
        (folder / file.name).symlink_to(file)
    internvl.configure_chat(folder, {"image_size": internvl.TILE, "patch_size": 14}, {})
    return folder


def prepared(preparation: LmdeployPreparation, jpeg: bytes, options: ImageOptions) -> tuple[numpy.ndarray, int, float, float]:
    """The tiles, the width that was decoded, and the seconds that decoding and preparing took."""
    start = time.perf_counter()
    picture, told = decode(jpeg, options, "picture", preparation.resized_size)
    between = time.perf_counter()
    arrays = preparation.prepare(ASK, [picture], [told])
    end = time.perf_counter()
    return arrays["0:float16"], picture.width, between - start, end - between


def eight_bits(tiles: numpy.ndarray) -> numpy.ndarray:
    return numpy.rint((tiles.astype(numpy.float32) * STD + MEAN) * 255)


def compare(form: str, preparation: LmdeployPreparation, most: int, jpegs: list[bytes], size: tuple[int, int]) -> str:
    """A row of the table: whole pictures against drafts."""
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    errors, widths = [], []
    for jpeg in jpegs * ROUNDS:
        tiles = {}
        for draft in (False, True):
            tiles[draft], width, *seconds = prepared(preparation, jpeg, ImageOptions(draft_decode=draft))
            times[draft].append((seconds[0], seconds[1]))
        widths.append(width)
        whole, drafted = eight_bits(tiles[False]), eight_bits(tiles[True])
        assert whole.shape == drafted.shape
        errors.append((float(numpy.abs(whole - drafted).mean()), float(((whole - drafted) ** 2).mean())))
    [scale] = {round(size[0] / width) for width in widths}
    mean, square = (sum(column) / len(errors) for column in zip(*errors, strict=True))
    whole_ms, draft_ms = (min(times[draft], key=sum) for draft in (False, True))
    noise = f"{10 * math.log10(255**2 / square):.1f} dB" if square else ""
    grid = " x ".join(str(side // internvl.TILE) for side in preparation.resized_size(*size) or ())
    cells = [
        form, f"{size[0]} x {size[1]}", most, grid, f"1/{scale}" if scale > 1 else "whole",
        *(f"{decoding * 1e3:.0f} + {preparing * 1e3:.0f}" for decoding, preparing in (whole_ms, draft_ms)),
        f"{sum(whole_ms) / sum(draft_ms):.1f}", f"{mean:.2f}", noise,
    ]  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    logging.disable(logging.WARNING)  # LMDeploy's, into the table
    print(
        "| form | picture | max tiles | tiles | decoded | ms whole | ms draft | times faster | mean difference | PSNR |"
    )
    print("|" + " --- |" * 10)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        hf = internvl.make("tiny", folder / "hf")
        forms = {
            "`-hf`": (hf, "InternVLForConditionalGeneration"),
            "Chat": (classic(folder / "classic", hf), "InternVLChatModel"),
        }
        jpegs = {size: photographs(size, PICTURES) for size in SIZES}
        for form, (path, architecture) in forms.items():
            for most in MAX_TILES:
                preparation = LmdeployPreparation(str(path), architecture, True, "float16", None, most, True, False)
                for size in SIZES:
                    print(compare(form, preparation, most, jpegs[size], size), flush=True)


if __name__ == "__main__":
    main()
