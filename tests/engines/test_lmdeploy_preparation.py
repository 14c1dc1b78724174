"""What image workers prepare for LMDeploy's engines is what LMDeploy prepares itself, to the bit, from the RGB on."""

from __future__ import annotations

import io

import numpy
import pytest
import pytest_asyncio
import torch
from PIL import Image

from batchvl.images.decode import decode
from batchvl.images.layout import Layout
from batchvl.options import ImageOptions
from batchvl.request import InlineImage, Row
from batchvl.shapes import MODEL
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import CoreLine, with_core
from tests.tiny_models import internvl, internvl_classic, qwen2_5_vl

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]

MAKERS = {"internvl": internvl, "internvl_classic": internvl_classic, "qwen2_5_vl": qwen2_5_vl}
SIZES = [
    (28, 28), (1, 1), (2, 300), (300, 2), (29, 31), (56, 28), (28, 56), (84, 28), (57, 111), (112, 112), (113, 112),
    (640, 480), (480, 640), (333, 777), (1000, 30), (224, 672), (1280, 960),
]  # fmt: skip


@pytest.fixture(scope="module", params=("shapes", *MAKERS))
def model(request, tmp_path_factory):
    name = request.param
    return MODEL if name == "shapes" else MAKERS[name](tmp_path_factory.mktemp("models") / name)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=(None, 3), ids=("", "max_tiles"))
async def both(request, model):
    """Two engines: one of which image workers prepare the rows, and one that has LMDeploy do it."""
    roomy = {"flags": {"session_len": 100_000}, "trust_remote_code": True, "max_tiles": request.param}
    async with (
        with_core(model, megabytes=64, **roomy) as ours,
        with_core(model, own=True, megabytes=64, **roomy) as own,
    ):
        assert ours.line.preparation_spec.factory.endswith(":Preparation")
        assert own.line.preparation_spec.factory.endswith(":Pictures")
        yield ours, own


async def same(both: tuple[CoreLine, CoreLine], *what, **how) -> None:
    """A row reaches the core just so from either: the prompt, its tokens, each picture's pixels, turn by turn."""
    (answer, ours), (expected, own) = [await line.ask(*what, **how) for line in both]
    assert [(a.prompt, a.tokens, a.pictures, a.digest) for a in ours] == [
        (a.prompt, a.tokens, a.pictures, a.digest) for a in own
    ]
    assert answer == expected
    assert answer.failure is None
    assert ours


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
async def test_a_picture_of_any_size(both, size):
    await same(both, "Who?", [picture(*size, seed=size[0])])


def encoded(mode: str, kind: str, **settings) -> bytes:
    pixels = numpy.random.default_rng(7).integers(0, 256, (61, 83, 4), dtype=numpy.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(numpy.uint16) * 257)
    else:
        image = image.convert(mode) if mode != "CMYK" else image.convert("RGB").convert("CMYK")
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


EXIF = Image.Exif()
EXIF[0x0112] = 6
FILES = {
    "grey": encoded("L", "PNG"), "grey, alpha": encoded("LA", "PNG"), "palette": encoded("P", "PNG"),
    "alpha": encoded("RGBA", "PNG"), "16 bits": encoded("I;16", "PNG"), "bilevel": encoded("1", "PNG"),
    "jpeg": encoded("RGB", "JPEG"), "cmyk": encoded("CMYK", "JPEG"), "grey jpeg": encoded("L", "JPEG"),
    "turned": encoded("RGB", "JPEG", exif=EXIF), "webp": encoded("RGB", "WEBP"), "gif": encoded("P", "GIF"),
}  # fmt: skip


@pytest.mark.parametrize("file", FILES)
async def test_a_picture_of_any_kind(both, file):
    found, _ = decode(FILES[file], ImageOptions(), file)
    await same(both, "Who?", [found])


async def test_several_pictures_in_their_places(both):
    drawn = [picture(90, 40, 1), picture(28, 28, 2), picture(31, 77, 3)]
    await same(both, "Which?", drawn)
    await same(both, "Of <IMAGE_TOKEN> and <IMAGE_TOKEN>\n, not <IMAGE_TOKEN>, which?", drawn)
    await same(both, "Which?", drawn, {"number_images": True, "system": "Be brief."})


async def test_words_that_tokenizers_might_join(both):
    for text in ("\n\nWhat?", " \u00fc\u4e16\u754c \n", "<|im_end|> and <IMG_CONTEXT>", "a" * 300, "{image}"):
        await same(both, text, [picture(40, 40)])
        await same(both, text)


async def test_turns(both):
    """The answers stand in the prompts of the next turns, and the pictures of all turns in theirs."""
    drawn = [picture(90, 40, 1), picture(28, 28, 2)]
    await same(both, ["Who?", "Why?", "Sure?"], drawn)
    await same(both, ["Who?\n<IMAGE_TOKEN>", "And <IMAGE_TOKEN>?", "\nSure?"], drawn)


async def test_questions_about_the_same_pictures_share_their_pixels(both):
    """As each would be prepared alone, and where the model's code allows it in the same memory."""
    preparation, drawn = both[0].line.preparation, [picture(90, 40, 1), picture(28, 28, 2)]
    requests = [both[0].request(Row(0, prompt=prompt, images=(InlineImage(b"", "drawn"),) * 2)) for prompt in "abc"]
    together = [preparation.prepare(request, drawn) for request in requests]
    alone = [preparation.prepare(request, list(drawn)) for request in requests]

    assert [found.keys() for found in together] == [found.keys() for found in alone]
    assert [found["0:float16" if "0:float16" in found else "0:float32"].tobytes() for found in together] == [
        found["0:float16" if "0:float16" in found else "0:float32"].tobytes() for found in alone
    ]
    assert [found["inputs"].tobytes() for found in together] == [found["inputs"].tobytes() for found in alone]
    layout = Layout()
    placed = [layout.add(found) for found in together]
    assert len({tensors[1].offset for tensors in placed}) == 1
    assert len({tensors[0].offset for tensors in placed}) == 3


async def test_no_pixel_is_copied_on_its_way_into_the_engine(model):
    """They lie in the arena, where the image worker has put them."""
    async with with_core(model, trust_remote_code=True) as line:
        seen = []
        ask = line.core.ask

        def looking(input_ids, multimodal, config):
            seen.extend(item["pixel_values"].data_ptr() for item in multimodal)
            return ask(input_ids, multimodal, config)

        line.core.ask = looking
        await line.asked("Who?", [picture(90, 40)])
        await line.ask(["Who?", "Why?"], [picture(90, 40)])
        start = torch.frombuffer(line.line.engine._arena._view, dtype=torch.uint8).data_ptr()
        assert [start <= pointer < start + line.line.arena.size for pointer in seen] == [True] * 3
