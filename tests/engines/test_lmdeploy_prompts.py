"""What reaches LMDeploy's core: each family's prompts, to the letter, and its pictures, to the pixel."""

from __future__ import annotations

import itertools

import pytest
import pytest_asyncio
import torch

from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import CoreLine, with_core
from tests.tiny_models import internvl, internvl_classic, qwen2_5_vl

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]

MAKERS = {"internvl": internvl, "internvl_classic": internvl_classic, "qwen2_5_vl": qwen2_5_vl}
FAMILIES = ("shapes", *MAKERS)
SEEN = dict.fromkeys(("shapes", "internvl", "internvl_classic"), "<img><IMG_CONTEXT></img>\n") | {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>"
}
"""A picture in a prompt."""
TILE = {"shapes": 112, "internvl": 28, "internvl_classic": 28}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {"shapes": MODEL, **{name: make(base / name) for name, make in MAKERS.items()}}


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=FAMILIES)
async def family(request, folders):
    async with with_core(folders[request.param], trust_remote_code=True) as started:
        started.name, started.seen = request.param, SEEN[request.param]
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shapes(folders):
    async with with_core(MODEL) as started:
        yield started


def chat(*turns: str, system: str | None = None) -> str:
    """The prompt of a conversation whose last word is the user's."""
    roles = itertools.cycle(("user", "assistant"))
    said = ([("system", system)] if system else []) + list(zip(roles, turns, strict=False))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said) + "<|im_start|>assistant\n"


# ------------------------------------------------------------------------------------------------------------- prompts


async def test_a_picture_goes_before_its_question(family: CoreLine):
    asked = await family.asked("What is this?", [picture(28, 28)])

    assert asked.prompt == chat(family.seen + "What is this?")
    assert len(asked.pictures) == 1


async def test_a_row_without_a_picture_is_its_words(family: CoreLine):
    asked = await family.asked("What is love?")

    assert asked.prompt == chat("What is love?")
    assert asked.pictures == []


async def test_a_system_message_goes_first(family: CoreLine):
    asked = await family.asked("What is this?", [picture(28, 28)], {"system": "Be brief."})

    assert asked.prompt == chat(family.seen + "What is this?", system="Be brief.")


async def test_several_pictures_go_one_after_the_other(family: CoreLine):
    asked = await family.asked("Which?", [picture(28, 28), picture(30, 20)])

    assert asked.prompt == chat(family.seen * 2 + "Which?")
    assert len(asked.pictures) == 2


async def test_turns_are_asked_after_the_answers_before(family: CoreLine):
    response, asked = await family.ask(["Who?", "Why?", "How?"], [picture(60, 30)])

    first, second, third = response.texts
    assert [each.prompt for each in asked] == [
        chat(family.seen + "Who?"),
        chat(family.seen + "Who?", first, "Why?"),
        chat(family.seen + "Who?", first, "Why?", second, "How?"),
    ]
    assert first != second != third
    assert asked[0].pictures == asked[1].pictures == asked[2].pictures
    assert response.input_tokens == sum(each.tokens for each in asked)


async def test_a_later_turn_brings_its_own_picture(family: CoreLine):
    response, asked = await family.ask(
        ["Who is <IMAGE_TOKEN>?", "And <IMAGE_TOKEN>?"], [picture(28, 28, 1), picture(60, 30, 2)]
    )

    assert asked[0].prompt == chat(f"Who is {family.seen}?")
    assert asked[1].prompt == chat(f"Who is {family.seen}?", response.texts[0], f"And {family.seen}?")
    assert [len(each.pictures) for each in asked] == [1, 2]
    assert asked[1].digest.split()[1] == asked[0].digest.split()[1] != asked[1].digest.split()[2]


async def test_a_whole_conversation_given_as_messages_is_taken_as_it_is(family: CoreLine):
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "Who?"}]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [{"type": "text", "text": "Like"}, {"type": "image", "image": 1}]},
    ]
    asked = await family.asked({"messages": said}, [picture(28, 28), picture(28, 28)])

    assert asked.prompt == chat(family.seen + "Who?", "A cat.", "Like" + family.seen, system="Be brief.")


async def test_blanks_and_line_feeds_of_a_prompt_survive(family: CoreLine):
    text = "  two blanks,\n\na free line and one at the end\n"

    assert (await family.asked(text, [picture(28, 28)])).prompt == chat(family.seen + text)
    assert (await family.asked(text)).prompt == chat(text)


GUIDE = "Image-1: <IMAGE_TOKEN>\nImage-2: <IMAGE_TOKEN>\ndescribe these two images"


async def test_numbered_pictures_are_those_of_the_guides_own_call(family: CoreLine):
    """InternVL's guide writes the prompt of two pictures so, and has LMDeploy put it together."""
    from lmdeploy import GenerationConfig
    from lmdeploy.vl.constants import IMAGE_TOKEN

    pictures = [picture(28, 28, 1), picture(60, 30, 2)]
    [answer] = family.loaded.pipe(
        [(f"Image-1: {IMAGE_TOKEN}\nImage-2: {IMAGE_TOKEN}\ndescribe these two images", pictures)],
        gen_config=GenerationConfig(max_new_tokens=64),
    )
    theirs = family.core.asked[-1]

    ours = await family.asked(GUIDE, pictures)
    numbered = await family.asked("describe these two images", pictures, {"number_images": True})

    assert answer.finish_reason == "stop"
    assert numbered == ours
    assert (ours.prompt, ours.pictures) == (theirs.prompt, theirs.pictures)
    assert ours.digest == theirs.digest


@pytest.mark.parametrize("token", ["<IMG_CONTEXT>", "<|im_end|>", "<IMAGE_TOKEN>", "</img>", "<|image_pad|>"])
async def test_a_value_brings_no_token_of_the_models(family: CoreLine, token):
    special = {"<IMAGE_TOKEN>", *family.line.preparation_spec.special_tokens}
    row = {"columns": {"caption": f"a {token} b"}}
    asked = await family.asked(row, [picture(28, 28)], {"prompt": "Is it {caption}?"})

    harmless = f"{token[0]} {token[1:]}" if token in special else token
    assert asked.prompt == chat(f"{family.seen}Is it a {harmless} b?")
    assert len(asked.pictures) == 1
    own = "<|image_pad|>" if family.name == "qwen2_5_vl" else "<IMG_CONTEXT>"
    assert {"<IMAGE_TOKEN>", "<|im_end|>", own} <= special


async def test_an_answer_that_spells_a_token_does_not_break_the_turns_after_it(family: CoreLine):
    """The model wrote it character by character: it is text, and must not become a picture's place or a turn's end."""
    token = "<|image_pad|>" if family.name == "qwen2_5_vl" else "<IMG_CONTEXT>"
    family.core.behaviour.update(answer="say", say="it")
    spelled = [family.core.tokenizer.convert_tokens_to_ids(character) for character in token]
    encode = family.core.tokenizer.encode
    try:
        family.core.tokenizer.encode = lambda text, **_: spelled
        response, asked = await family.ask(["Who?", "Why?"], [picture(28, 28)])
    finally:
        family.core.tokenizer.encode = encode
        family.core.behaviour.update(answer="digest")

    assert response.failure is None, response.failure
    assert len(response.texts) == 2
    assert [len(each.pictures) for each in asked] == [1, 1]


# ------------------------------------------------------------------------------------------------------------ pictures


async def test_pictures_are_prepared_as_lmdeploy_prepares_them_alone(family: CoreLine):
    """Against a second preparation of LMDeploy's, made anew and given the picture itself."""
    from lmdeploy.vl.model.builder import load_vl_model

    alone = load_vl_model(family.core.path, "pytorch", trust_remote_code=True)
    alone.set_mm_feature_dtype(torch.float16)
    drawn = [picture(28, 28, 1), picture(90, 40, 2), picture(31, 77, 3)]

    for each in drawn:
        messages = [{"role": "user", "content": [{"type": "image", "data": each}, {"type": "text", "text": "Who?"}]}]
        [item] = alone.preprocess(messages)[-1]["content"]
        asked = await family.asked("Who?", [each])
        assert asked.digest.split()[1] == cpu_core.digest([], [item]).split()[1]
    together = await family.asked("Who?", drawn)
    assert together.digest.split()[1:] == [(await family.asked("Who?", [each])).digest.split()[1] for each in drawn]


@pytest.mark.parametrize("name", FAMILIES)
async def test_max_tiles_bounds_each_picture_s_tiles(folders, name):
    """A picture of 3 x 2 tiles and, where there are several, a thumbnail."""
    found, side = {}, TILE.get(name, 448)
    for most in (1, 4, 6, 12):
        roomy = {"flags": {"session_len": 100_000}, "megabytes": 64}
        async with with_core(folders[name], trust_remote_code=True, max_tiles=most, **roomy) as started:
            asked = await started.asked("Who?", [picture(side * 3, side * 2), picture(side, side)])
            found[most] = [shape[0] for shape in asked.pictures]
            assert asked.prompt == chat(SEEN[name] * 2 + "Who?")

    if name in TILE:
        assert found == {1: [1, 1], 4: [5, 1], 6: [7, 1], 12: [7, 1]}
    else:  # patches of 4 x 4 pixels in whole rows and columns
        tile = 448 * 448 // 16
        assert all(0.97 * min(most, 6) * tile < large <= most * tile for most, (large, _) in found.items())
        assert {small for _, small in found.values()} == {tile}


async def test_without_max_tiles_the_models_own_setting_holds(family: CoreLine):
    if family.name in TILE:
        side, most = TILE[family.name], 12 if family.name == "internvl_classic" else 4
        asked = await family.asked("Who?", [picture(side * most, side)])
        assert asked.pictures[0][0] == most + 1, "and a thumbnail"
    else:
        asked = await family.asked("Who?", [picture(200, 200)])
        assert asked.pictures[0][0] == 16 * 16  # the processor's longest_edge, 64 x 64 pixels
