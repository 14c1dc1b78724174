"""What image workers prepare for LMDeploy's engines is exactly what LMDeploy prepares itself, from RGB pixels on."""

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
from batchvl.types import Extent, InlineImage, Row
from batchvl.types import Image as ImageInfo
from tests.engines.in_process import draw_image, make_request, user_message
from tests.engines.lmdeploy_harness import LmdeployHarness, start_lmdeploy
from tests.tiny_models import internvl, internvl_chat, qwen2_5_vl

if TYPE_CHECKING:  # it needs LMDeploy, and this file is also collected without
    from batchvl.engines.lmdeploy.preparation import LmdeployPreparation

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]

MAKERS = {"internvl": internvl, "internvl_chat": internvl_chat, "qwen2_5_vl": qwen2_5_vl}
SIZES = [
    *[(28, 28), (1, 1), (2, 300), (300, 2), (29, 31), (56, 28), (28, 56), (84, 28), (57, 111), (112, 112)],
    *[(113, 112), (640, 480), (480, 640), (333, 777), (1000, 30), (224, 672), (1280, 960)],
]


@pytest.fixture(scope="module", params=("shapes", *MAKERS))
def model(request, tmp_path_factory):
    name = request.param
    return MODEL if name == "shapes" else MAKERS[name](tmp_path_factory.mktemp("models") / name)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=(None, 3), ids=("", "max_tiles"))
async def both(request, model):
    """Start two engines: one for which image workers prepare rows, and one for which LMDeploy itself does."""
    settings = {
        "flags": {"session_len": 100_000},
        "trust_remote_code": True,
        "max_tiles": request.param,
        "megabytes": 64,
    }
    async with (
        start_lmdeploy(model, **settings) as workers,
        start_lmdeploy(model, prepares_images=True, **settings) as lmdeploy,
    ):
        assert workers.harness.preparation_spec.factory.endswith(":LmdeployPreparation")
        assert lmdeploy.harness.preparation_spec.factory.endswith(":RawImages")
        yield workers, lmdeploy


async def check_same(both: tuple[LmdeployHarness, LmdeployHarness], *arguments, **settings) -> None:
    """Check that a row reaches the core alike from either: prompt, tokens and pixels of each image, turn by turn."""
    (response, requests), (expected_response, expected) = [
        await lmdeploy.ask(*arguments, **settings) for lmdeploy in both
    ]
    assert [(request.prompt, request.tokens, request.images, request.digest) for request in requests] == [
        (request.prompt, request.tokens, request.images, request.digest) for request in expected
    ]
    assert response == expected_response
    assert response.failure is None
    assert requests


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
async def test_images_of_any_size(both, size):
    await check_same(both, "Who?", [draw_image(*size, seed=size[0])])


def encode(mode: str, kind: str, **settings) -> bytes:
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
    "grey": encode("L", "PNG"),
    "grey, alpha": encode("LA", "PNG"),
    "palette": encode("P", "PNG"),
    "alpha": encode("RGBA", "PNG"),
    "16 bits": encode("I;16", "PNG"),
    "bilevel": encode("1", "PNG"),
    "jpeg": encode("RGB", "JPEG"),
    "cmyk": encode("CMYK", "JPEG"),
    "grey jpeg": encode("L", "JPEG"),
    "rotated": encode("RGB", "JPEG", exif=EXIF),
    "webp": encode("RGB", "WEBP"),
    "gif": encode("P", "GIF"),
}


@pytest.mark.parametrize("file", FILES)
async def test_images_of_any_format(both, file):
    image, _ = decode(FILES[file], ImageOptions(), file)
    await check_same(both, "Who?", [image])


async def test_several_images_in_their_places(both):
    images = [draw_image(90, 40, 1), draw_image(28, 28, 2), draw_image(31, 77, 3)]
    await check_same(both, "Which?", images)
    await check_same(both, "Of <IMAGE_TOKEN> and <IMAGE_TOKEN>\n, not <IMAGE_TOKEN>, which?", images)
    await check_same(both, "Which?", images, {"number_images": True, "system": "Be brief."})


async def test_text_that_tokenizers_might_join(both):
    for text in ("\n\nWhat?", " \u00fc\u4e16\u754c \n", "<|im_end|> and <IMG_CONTEXT>", "a" * 300, "{image}"):
        await check_same(both, text, [draw_image(40, 40)])
        await check_same(both, text)


async def test_turns(both):
    """Prompts contain the answers before them, and the images of all turns so far."""
    images = [draw_image(90, 40, 1), draw_image(28, 28, 2)]
    await check_same(both, ["Who?", "Why?", "Sure?"], images)
    await check_same(both, ["Who?\n<IMAGE_TOKEN>", "And <IMAGE_TOKEN>?", "\nSure?"], images)


async def test_questions_about_the_same_images_share_their_pixels(both):
    """They are prepared as each would be alone, and if the model's code allows it, in the same memory."""
    preparation, images = both[0].harness.preparation, [draw_image(90, 40, 1), draw_image(28, 28, 2)]
    rows = [Row(0, prompt=prompt, images=(InlineImage(b"", "drawn"),) * 2) for prompt in "abc"]
    requests = list(map(both[0].request, rows))
    together = [preparation.prepare(request, images) for request in requests]
    alone = [preparation.prepare(request, list(images)) for request in requests]

    pixels = "0:float16" if "0:float16" in alone[0] else "0:float32"
    assert [arrays.keys() for arrays in together] == [arrays.keys() for arrays in alone]
    assert [arrays[pixels].tobytes() for arrays in together] == [arrays[pixels].tobytes() for arrays in alone]
    assert [arrays["inputs"].tobytes() for arrays in together] == [arrays["inputs"].tobytes() for arrays in alone]
    packer = ArenaPacker()
    packed = [packer.add(arrays) for arrays in together]
    assert len({tensors[1].offset for tensors in packed}) == 1
    assert len({tensors[0].offset for tensors in packed}) == 3


async def test_no_pixel_is_copied_on_its_way_into_the_engine(model, monkeypatch):
    """Pixels stay in the arena, where the image worker has written them."""
    async with start_lmdeploy(model, trust_remote_code=True) as lmdeploy:
        pointers = []
        receive = lmdeploy.core.receive

        def record(input_ids, multimodal, config):
            pointers.extend(item["pixel_values"].data_ptr() for item in multimodal)
            return receive(input_ids, multimodal, config)

        monkeypatch.setattr(lmdeploy.core, "receive", record)
        await lmdeploy.ask_once("Who?", [draw_image(90, 40)])
        await lmdeploy.ask(["Who?", "Why?"], [draw_image(90, 40)])
        arena = lmdeploy.harness.arena
        start = torch.frombuffer(arena.at(Extent(0, arena.size)), dtype=torch.uint8).data_ptr()
        assert [start <= pointer < start + arena.size for pointer in pointers] == [True] * 3


# ------------------------------------------------------------------------------------------------------- draft decoding


@pytest.fixture(scope="module", params=(None, 3), ids=("", "max_tiles"))
def preparation(request, model):
    return load_preparation(model, request.param)


def load_preparation(model, max_tiles=None, **settings) -> LmdeployPreparation:
    from batchvl.engines.lmdeploy.preparation import LmdeployPreparation

    [architecture] = json.loads((Path(model) / "config.json").read_text())["architectures"]
    options = {"architecture": architecture, "draft_decode": True, "fingerprints": False, **settings}
    return LmdeployPreparation(
        str(model), trust_remote_code=True, dtype="float32", template=None, max_tiles=max_tiles, **options
    )


def prepare(preparation: LmdeployPreparation, image: Image.Image) -> tuple[dict[str, Any], list[numpy.ndarray]]:
    """Return the inputs of a row with one image, without its tensors and its size, and the tensors."""
    request = make_request(0, user_message("Who?", 0))
    arrays = preparation.prepare(request, [image], [ImageInfo("it", sha256="0")])
    inputs = msgspec.msgpack.decode(arrays.pop("inputs").tobytes())
    [item] = inputs["multimodal"]
    item.pop("image_size", None)
    return inputs, list(arrays.values())


RANDOM = random.Random(0)
RANDOM_SIZES = [(RANDOM.randint(2, 400), RANDOM.randint(2, 400)) for _ in range(40)]


@pytest.mark.parametrize("size", [*SIZES, *RANDOM_SIZES], ids=lambda size: "x".join(map(str, size)))
async def test_the_resized_size_is_that_of_the_tiles(preparation, size):
    image = draw_image(*size, seed=size[0])
    width, height = preparation.resized_size(*size)
    _, tensors = prepare(preparation, image)
    grids = [tensor.tolist() for tensor in tensors if tensor.dtype.kind == "i"]
    if grids:  # Qwen2.5-VL, with patches of 4 x 4 pixels
        assert grids[0] == [[1, height // 4, width // 4]]
    else:
        [tiles] = tensors
        side = tiles.shape[-1]
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        corners = [(left, top) for top in range(0, height, side) for left in range(0, width, side)]
        assert len(tiles) == len(corners) + (len(corners) > 1)
        for tile, (left, top) in zip(tiles, corners, strict=False):
            expected = numpy.asarray(resized.crop((left, top, left + side, top + side)), numpy.float32)
            # The bicubic filters of Pillow and torchvision differ a little; a tile from another place differs a lot.
            assert numpy.abs(denormalize(preparation, tile) - expected.transpose(2, 0, 1)).mean() < 1


def denormalize(preparation: LmdeployPreparation, tile: numpy.ndarray) -> numpy.ndarray:
    """Return a tile's pixels, from 0 to 255, before normalization."""
    processor = getattr(preparation.vision_model.processor, "image_processor", None)
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if processor is not None:
        mean, std = processor.image_mean, processor.image_std
    return (tile * numpy.reshape(std, (3, 1, 1)) + numpy.reshape(mean, (3, 1, 1))) * 255


def jpeg(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    draw_image(8, 6).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    return file.getvalue()


DRAFT = ImageOptions(draft_decode=True)


@pytest.mark.parametrize(
    "size", [(1280, 960), (1281, 959), (960, 1280), (899, 300), (2600, 1700)], ids=lambda size: "x".join(map(str, size))
)
async def test_a_draft_becomes_the_same_tokens_and_tiles(preparation, size):
    data = jpeg(size)
    draft, info = decode(data, DRAFT, "it", preparation.resized_size)
    whole, expected_info = decode(data, ImageOptions(), "it", preparation.resized_size)
    assert info == expected_info
    needed = preparation.resized_size(*size)
    assert (draft.size != size) == all(have >= 2 * need for have, need in zip(size, needed, strict=True))
    assert all(have >= need for have, need in zip(draft.size, needed, strict=True)) or draft.size == size
    (inputs, tensors), (expected_inputs, expected_tensors) = prepare(preparation, draft), prepare(preparation, whole)
    assert inputs == expected_inputs
    for tensor, expected in zip(tensors, expected_tensors, strict=True):
        assert tensor.shape == expected.shape
        assert numpy.abs(tensor - expected).mean() < 0.05, "another image: values are from -2 to 3"


async def test_a_draft_that_would_be_tiled_differently_is_not_used(tmp_path):
    """A height of 1733 does not halve: the aspect ratio is a little over 3:2, and the draft's a little under."""
    preparation = load_preparation(internvl(tmp_path / "internvl"))
    assert (preparation.resized_size(2600, 1733), preparation.resized_size(1300, 867)) == ((56, 28), (56, 56))
    image, _ = decode(jpeg((2600, 1733)), DRAFT, "it", preparation.resized_size)
    assert image.size == (2600, 1733)


async def test_the_resized_size_of_images_that_a_model_refuses_is_unknown(tmp_path):
    assert load_preparation(qwen2_5_vl(tmp_path / "qwen")).resized_size(30, 6030) is None


async def test_the_resized_size_of_unknown_architectures_is_unknown(model):
    preparation = load_preparation(model, architecture="LlavaForConditionalGeneration")
    assert preparation.resized_size(4000, 3000) is None


async def test_drafts_have_other_fingerprints(model):
    """TurboMind treats images with the same fingerprint as the same image."""
    fingerprints = set()
    for draft_decode in (False, True):
        preparation = load_preparation(model, fingerprints=True, draft_decode=draft_decode)
        inputs, _ = prepare(preparation, draw_image(90, 40))
        fingerprints.add(inputs["multimodal"][0]["fingerprint"])
    assert len(fingerprints) == 2
