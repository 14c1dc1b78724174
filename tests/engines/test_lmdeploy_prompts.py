"""What reaches LMDeploy's core: each family's prompts, to the character, and its images, to the pixel."""

from __future__ import annotations

import itertools

import pytest
import pytest_asyncio
import torch

from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import LmdeployHarness, start_lmdeploy
from tests.tiny_models import internvl, internvl_chat, qwen2_5_vl

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]

MAKERS = {"internvl": internvl, "internvl_chat": internvl_chat, "qwen2_5_vl": qwen2_5_vl}
FAMILIES = ("shapes", *MAKERS)
IMAGE_TEXT = dict.fromkeys(("shapes", "internvl", "internvl_chat"), "<img><IMG_CONTEXT></img>\n") | {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"
}
"""How each family writes an image in a prompt."""
TILE = {"shapes": 112, "internvl": 28, "internvl_chat": 28}
"""Width and height of a tile, of the families that cut images into tiles."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"shapes": MODEL, **{name: make(base / name) for name, make in MAKERS.items()}}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def family(request, models):
    async with start_lmdeploy(models[request.param], trust_remote_code=True) as harness:
        harness.name, harness.image_text = request.param, IMAGE_TEXT[request.param]
        yield harness


def render(*turns: str, system: str | None = None) -> str:
    """Return the prompt of a conversation that ends with the user's message."""
    roles = itertools.cycle(("user", "assistant"))
    messages = ([("system", system)] if system else []) + list(zip(roles, turns, strict=False))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages) + "<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------------------- prompts


async def test_an_image_precedes_its_question(family: LmdeployHarness):
    request = await family.ask_once("What is this?", [draw_image(28, 28)])

    assert request.prompt == render(family.image_text + "What is this?")
    assert len(request.images) == 1


async def test_a_row_without_an_image_is_only_text(family: LmdeployHarness):
    request = await family.ask_once("What is love?")

    assert request.prompt == render("What is love?")
    assert request.images == []


async def test_a_system_message_comes_first(family: LmdeployHarness):
    request = await family.ask_once("What is this?", [draw_image(28, 28)], {"system": "Be brief."})

    assert request.prompt == render(family.image_text + "What is this?", system="Be brief.")


async def test_several_images_follow_one_another(family: LmdeployHarness):
    request = await family.ask_once("Which?", [draw_image(28, 28), draw_image(30, 20)])

    assert request.prompt == render(family.image_text * 2 + "Which?")
    assert len(request.images) == 2


async def test_turns_are_asked_after_the_answers_before(family: LmdeployHarness):
    response, requests = await family.ask(["Who?", "Why?", "How?"], [draw_image(60, 30)])

    first, second, third = response.texts
    assert [request.prompt for request in requests] == [
        render(family.image_text + "Who?"),
        render(family.image_text + "Who?", first, "Why?"),
        render(family.image_text + "Who?", first, "Why?", second, "How?"),
    ]
    assert first != second != third
    assert requests[0].images == requests[1].images == requests[2].images
    assert response.input_tokens == sum(request.tokens for request in requests)


async def test_a_later_turn_adds_its_own_image(family: LmdeployHarness):
    response, requests = await family.ask(
        ["Who is <IMAGE_TOKEN>?", "And <IMAGE_TOKEN>?"], [draw_image(28, 28, 1), draw_image(60, 30, 2)]
    )

    assert requests[0].prompt == render(f"Who is {family.image_text}?")
    assert requests[1].prompt == render(f"Who is {family.image_text}?", response.texts[0], f"And {family.image_text}?")
    assert [len(request.images) for request in requests] == [1, 2]
    assert requests[1].digest.split()[1] == requests[0].digest.split()[1] != requests[1].digest.split()[2]


async def test_a_conversation_given_as_messages_is_used_unchanged(family: LmdeployHarness):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Like"}, {"type": "image", "image": 1}]},
    ]
    request = await family.ask_once({"messages": messages}, [draw_image(28, 28), draw_image(28, 28)])

    image = family.image_text
    assert request.prompt == render(image + "Who?", "A cat.", "Like" + image, system="Be brief.")


async def test_blanks_and_line_feeds_of_a_prompt_are_kept(family: LmdeployHarness):
    text = "  two blanks,\n\nan empty line and a line feed at the end\n"

    request = await family.ask_once(text, [draw_image(28, 28)])
    assert request.prompt == render(family.image_text + text)
    assert (await family.ask_once(text)).prompt == render(text)


async def test_numbered_images_are_like_those_of_internvl_s_guide(family: LmdeployHarness):
    """The guide writes the prompt of two images like this, and LMDeploy itself inserts them."""
    from lmdeploy import GenerationConfig
    from lmdeploy.vl.constants import IMAGE_TOKEN

    images = [draw_image(28, 28, 1), draw_image(60, 30, 2)]
    guide = "Image-1: {0}\nImage-2: {0}\ndescribe these two images"
    [answer] = family.model.pipe([(guide.format(IMAGE_TOKEN), images)], gen_config=GenerationConfig(max_new_tokens=64))
    expected = family.core.requests[-1]

    written = await family.ask_once(guide.format("<IMAGE_TOKEN>"), images)
    numbered = await family.ask_once("describe these two images", images, {"number_images": True})

    assert answer.finish_reason == "stop"
    assert numbered == written
    assert (written.prompt, written.images) == (expected.prompt, expected.images)
    assert written.digest == expected.digest


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>", "<IMAGE_TOKEN>", "</img>", "<|image_pad|>"])
async def test_a_value_adds_no_special_token(family: LmdeployHarness, token):
    special = {"<IMAGE_TOKEN>", *family.harness.preparation_spec.special_tokens}
    row = {"columns": {"caption": f"a {token} b"}}
    request = await family.ask_once(row, [draw_image(28, 28)], {"prompt": "Is it {caption}?"})

    escaped = f"{token[0]} {token[1:]}" if token in special else token
    assert request.prompt == render(f"{family.image_text}Is it a {escaped} b?")
    assert len(request.images) == 1
    image_token = "<|image_pad|>" if family.name == "qwen2_5_vl" else "<IMG_CONTEXT>"
    assert {"<IMAGE_TOKEN>", "<|im_end|>", image_token} <= special


async def test_an_answer_that_spells_a_special_token_does_not_break_later_turns(family: LmdeployHarness, monkeypatch):
    """The model wrote it character by character: it is text, and must not stand for an image or end a turn."""
    token = "<|image_pad|>" if family.name == "qwen2_5_vl" else "<IMG_CONTEXT>"
    ids = [family.core.tokenizer.convert_tokens_to_ids(character) for character in token]
    monkeypatch.setattr(family.core.tokenizer, "encode", lambda text, **_: ids)
    with family.restored_behaviour():
        family.core.behaviour.update(answer="text", text="it")
        response, requests = await family.ask(["Who?", "Why?"], [draw_image(28, 28)])

    assert response.failure is None, response.failure
    assert len(response.texts) == 2
    assert [len(request.images) for request in requests] == [1, 1]


# -------------------------------------------------------------------------------------------------------------- images


async def test_images_are_prepared_as_lmdeploy_prepares_each_alone(family: LmdeployHarness):
    """Compared with a second vision model of LMDeploy's, which is given the image itself."""
    from lmdeploy.vl.model.builder import load_vl_model

    vision_model = load_vl_model(family.core.path, "pytorch", trust_remote_code=True)
    vision_model.set_mm_feature_dtype(torch.float16)
    images = [draw_image(28, 28, 1), draw_image(90, 40, 2), draw_image(31, 77, 3)]

    digests = []
    for image in images:
        messages = [{"role": "user", "content": [{"type": "image", "data": image}, {"type": "text", "text": "Who?"}]}]
        [item] = vision_model.preprocess(messages)[-1]["content"]
        request = await family.ask_once("Who?", [image])
        digests.append(request.digest.split()[1])
        assert digests[-1] == cpu_core.digest([], [item]).split()[1]
    assert (await family.ask_once("Who?", images)).digest.split()[1:] == digests


@pytest.mark.parametrize("name", FAMILIES)
async def test_max_tiles_limits_the_tiles_of_each_image(models, name):
    """For an image of 3 x 2 tiles, and a thumbnail if there are several tiles."""
    tiles, side = {}, TILE.get(name, 448)
    for limit in (1, 4, 6, 12):
        large = {"flags": {"session_len": 100_000}, "megabytes": 64}
        async with start_lmdeploy(models[name], trust_remote_code=True, max_tiles=limit, **large) as lmdeploy:
            request = await lmdeploy.ask_once("Who?", [draw_image(side * 3, side * 2), draw_image(side, side)])
            tiles[limit] = [shape[0] for shape in request.images]
            assert request.prompt == render(IMAGE_TEXT[name] * 2 + "Who?")

    if name in TILE:
        assert tiles == {1: [1, 1], 4: [5, 1], 6: [7, 1], 12: [7, 1]}
    else:  # patches of 4 x 4 pixels, in whole rows and columns
        patches = 448 * 448 // 16
        assert all(0.97 * min(limit, 6) * patches < large <= limit * patches for limit, (large, _) in tiles.items())
        assert {small for _, small in tiles.values()} == {patches}


async def test_without_max_tiles_the_model_s_own_setting_applies(family: LmdeployHarness):
    if family.name in TILE:
        side, limit = TILE[family.name], 12 if family.name == "internvl_chat" else 4
        request = await family.ask_once("Who?", [draw_image(side * limit, side)])
        assert request.images[0][0] == limit + 1, "with a thumbnail"
    else:
        request = await family.ask_once("Who?", [draw_image(200, 200)])
        assert request.images[0][0] == 16 * 16  # the processor's longest_edge, 64 x 64 pixels
