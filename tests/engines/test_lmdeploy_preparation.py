"""What image workers prepare for LMDeploy's engines is what LMDeploy prepares itself, to the bit, from the RGB on."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy
import pytest
import pytest_asyncio
import torch
from PIL import Image

from batchvl.config.options import ImageOptions
from batchvl.images.decode import decode
from batchvl.images.packing import ArenaPacker
from batchvl.shapes import MODEL
from batchvl.types import Image as Told
from batchvl.types import Extent, InlineImage, Row
from tests.engines.in_process import ask, picture, request
from tests.engines.lmdeploy_line import CoreLine, with_core
from tests.tiny_models import internvl, internvl_classic, qwen2_5_vl

if TYPE_CHECKING:  # it wants LMDeploy, and both environments collect this file
    from batchvl.engines.lmdeploy.preparation import LmdeployPreparation

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
        assert ours.line.preparation_spec.factory.endswith(":LmdeployPreparation")
        assert own.line.preparation_spec.factory.endswith(":RawImages")
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
    layout = ArenaPacker()
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
        start = torch.frombuffer(line.line.arena.at(Extent(0, line.line.arena.size)), dtype=torch.uint8).data_ptr()
        assert [start <= pointer < start + line.line.arena.size for pointer in seen] == [True] * 3


# ---------------------------------------------------------------------------------------------------------- drafts


@pytest.fixture(scope="module", params=(None, 3), ids=("", "max_tiles"))
def preparation(request, model):
    return prepares(model, request.param)


def prepares(model, max_tiles=None, **more) -> LmdeployPreparation:
    from batchvl.engines.lmdeploy.preparation import LmdeployPreparation

    [architecture] = json.loads((Path(model) / "config.json").read_text())["architectures"]
    options = {"architecture": architecture, "draft_decode": True, "fingerprints": False, **more}
    return LmdeployPreparation(
        str(model), trust_remote_code=True, dtype="float32", template=None, max_tiles=max_tiles, **options
    )


def made(preparation: LmdeployPreparation, drawn: Image.Image) -> tuple[dict[str, Any], list[numpy.ndarray]]:
    """The prompt's tokens, the picture's part but for its tensors and its size, and those tensors."""
    arrays = preparation.prepare(request(0, ask("Who?", 0)), [drawn], [Told("it", sha256="0")])
    inputs = msgspec.msgpack.decode(arrays.pop("inputs").tobytes())
    [part] = inputs["multimodal"]
    part.pop("image_size", None)
    return inputs, list(arrays.values())


FEW = random.Random(0)
DRAWN = [(FEW.randint(2, 400), FEW.randint(2, 400)) for _ in range(40)]


@pytest.mark.parametrize("size", [*SIZES, *DRAWN], ids=lambda size: "x".join(map(str, size)))
async def test_the_size_that_is_made_of_a_picture(preparation, size):
    drawn = picture(*size, seed=size[0])
    width, height = preparation.resized_size(*size)
    _, tensors = made(preparation, drawn)
    grids = [tensor.tolist() for tensor in tensors if tensor.dtype.kind == "i"]
    if grids:  # Qwen2.5-VL's, of patches of 4 x 4 pixels
        assert grids[0] == [[1, height // 4, width // 4]]
    else:
        [tiles] = tensors
        side = tiles.shape[-1]
        whole = drawn.resize((width, height), Image.Resampling.BICUBIC)
        corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
        assert len(tiles) == len(corners) + (len(corners) > 1)
        for tile, (left, top) in zip(tiles, corners, strict=False):
            expected = numpy.asarray(whole.crop((left, top, left + side, top + side)), numpy.float32)
            # Pillow's bicubic filter and torchvision's differ a little; a tile of another place is far off.
            assert numpy.abs(eight_bits(preparation, tile) - expected.transpose(2, 0, 1)).mean() < 1


def eight_bits(preparation: LmdeployPreparation, tile: numpy.ndarray) -> numpy.ndarray:
    """A tile's pixels, 0 to 255, before they were normalised."""
    images = getattr(preparation.vision_model.processor, "image_processor", None)
    mean, std = (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if images is None else (images.image_mean, images.image_std)
    )
    return (tile * numpy.reshape(std, (3, 1, 1)) + numpy.reshape(mean, (3, 1, 1))) * 255


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    picture(8, 6).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


@pytest.mark.parametrize(
    "size", [(1280, 960), (1281, 959), (960, 1280), (899, 300), (2600, 1700)], ids=lambda size: "x".join(map(str, size))
)
async def test_a_draft_becomes_the_same_tokens_and_tiles(preparation, size):
    data = jpeg(size)
    drafted, told = decode(data, ImageOptions(draft_decode=True), "it", preparation.resized_size)
    whole, expected = decode(data, ImageOptions(), "it", preparation.resized_size)
    assert told == expected
    used = preparation.resized_size(*size)
    assert (drafted.size != size) == all(have >= 2 * want for have, want in zip(size, used, strict=True))
    assert all(have >= want for have, want in zip(drafted.size, used, strict=True)) or drafted.size == size
    (inputs, tensors), (inputs_of_whole, tensors_of_whole) = made(preparation, drafted), made(preparation, whole)
    assert inputs == inputs_of_whole
    for found, wanted in zip(tensors, tensors_of_whole, strict=True):
        assert found.shape == wanted.shape
        assert numpy.abs(found - wanted).mean() < 0.05, "another picture: values are -2 to 3"


async def test_a_draft_that_would_be_tiled_otherwise_is_not_taken(tmp_path):
    """A height of 1733 does not halve: the aspect ratio is a little over 3 to 2, and the draft's a little under."""
    preparation = prepares(internvl(tmp_path / "internvl"))
    assert (preparation.resized_size(2600, 1733), preparation.resized_size(1300, 867)) == ((56, 28), (56, 56))
    assert decode(jpeg((2600, 1733)), ImageOptions(draft_decode=True), "it", preparation.resized_size)[0].size == (2600, 1733)


async def test_pictures_that_a_model_refuses_have_no_size(tmp_path):
    assert prepares(qwen2_5_vl(tmp_path / "qwen")).resized_size(30, 6030) is None


async def test_models_that_tile_in_ways_unknown_have_no_size(model):
    preparation = prepares(model, architecture="LlavaForConditionalGeneration")
    assert preparation.resized_size(4000, 3000) is None


async def test_drafts_have_other_fingerprints(model):
    """TurboMind takes pictures of one fingerprint for one."""
    prints = set()
    for draft_decode in (False, True):
        inputs, _ = made(prepares(model, fingerprints=True, draft_decode=draft_decode), picture(90, 40))
        prints.add(inputs["multimodal"][0]["fingerprint"])
    assert len(prints) == 2
