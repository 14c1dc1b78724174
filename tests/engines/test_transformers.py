"""The transformers engine from images to text, with a tiny random model of each family."""

from __future__ import annotations

import asyncio
import copy

import pytest
from transformers import AutoModelForImageTextToText, GenerationConfig

from batchvl.engines.transformers.generation import Generation
from batchvl.engines.transformers.processor import load_processor
from batchvl.types import ContentPart, Failure, Message, Request
from tests.engines.in_process import EngineHarness, draw_image, make_request, start_transformers, user_message
from tests.tiny_models import CONTEXT, FAMILIES


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: make(base / name) for name, make in FAMILIES.items()}


@pytest.fixture(params=FAMILIES)
async def tiny(request, models):
    async with start_transformers(models[request.param]) as started:
        yield started


@pytest.fixture
async def internvl(models):
    async with start_transformers(models["internvl"]) as started:
        yield started


MIXED = [
    (make_request(0, user_message("hello", 0)), [draw_image(28, 28, 1)]),
    (make_request(1, user_message("what is this then, tell me all", 0), max_new_tokens=5), [draw_image(90, 40, 2)]),
    (make_request(2, user_message("no image at all")), []),
    (make_request(3, user_message("two in one", 1, 0)), [draw_image(30, 90, 3), draw_image(56, 56, 4)]),
    (make_request(4, user_message("first", 0), user_message("then"), user_message("last")), [draw_image(57, 27, 5)]),
    (
        make_request(5, user_message("first", 0), user_message("another later", 1)),
        [draw_image(20, 80, 6), draw_image(60, 60, 7)],
    ),
    (make_request(6, user_message("words first"), user_message("then an image", 0)), [draw_image(40, 40, 8)]),
]


async def test_a_batch_of_mixed_rows_answers_as_each_row_alone(tiny: EngineHarness):
    together = await tiny.ask(*MIXED)

    assert together == await tiny.ask_each(*MIXED)
    assert [len(response.texts) for response in together] == [1, 1, 1, 1, 3, 2, 2]
    assert not [response.failure for response in together if response.failure]


async def test_answers_depend_on_the_row_s_own_images(tiny: EngineHarness):
    rows = [
        (make_request(row, user_message("what?", 0)), [draw_image(40, 40, seed)]) for row, seed in enumerate((1, 2, 1))
    ]

    first, other, same = await tiny.ask(*rows)

    assert first.texts == same.texts
    assert first.texts != other.texts


async def test_images_are_shown_in_the_order_of_the_messages(tiny: EngineHarness):
    images = [draw_image(40, 40, 1), draw_image(60, 30, 2)]

    first, second, swapped = await tiny.ask(
        (make_request(0, user_message("what?", 0, 1)), images),
        (make_request(1, user_message("what?", 1, 0)), images),
        (make_request(2, user_message("what?", 0, 1)), images[::-1]),
    )

    assert first.texts != second.texts
    assert second.texts == swapped.texts


@pytest.mark.parametrize("name", FAMILIES)
async def test_turns_equal_the_whole_conversation_in_one_prompt(models, name):
    """The reference is transformers' own way: the processor's chat template and a greedy `generate` for each turn."""
    turns = [user_message("hello you", 0), user_message("go on"), user_message("and this?", 1)]
    images = [draw_image(60, 30, 1), draw_image(40, 40, 2)]
    async with start_transformers(models[name]) as started:
        [response] = await started.ask((make_request(0, *turns), images))
    processor, model = load_processor(str(models[name])), AutoModelForImageTextToText.from_pretrained(models[name])
    model.generation_config = GenerationConfig(
        eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=processor.tokenizer.pad_token_id
    )
    chat, answers, input_tokens = [], [], 0
    for turn in turns:
        content = [
            {"type": "image", "image": images[part.image]} if part.text is None else {"type": "text", "text": part.text}
            for part in turn.parts
        ]
        chat.append({"role": "user", "content": content})
        inputs = processor.apply_chat_template(
            copy.deepcopy(chat), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(output, skip_special_tokens=True))
        chat.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
        input_tokens += inputs["input_ids"].shape[1]

    assert response.texts == tuple(answers)
    assert response.input_tokens == input_tokens


async def test_history_and_system_message_are_part_of_the_prompt(internvl: EngineHarness):
    history = (
        Message("system", (ContentPart("be brief"),)),
        user_message("hello", 0),
        Message("assistant", (ContentPart("a cat"),)),
        user_message("sure?"),
    )
    without_history = make_request(0, user_message("hello", 0))
    with_history = Request(1, history, sampling=without_history.sampling)

    short, long = await internvl.ask((without_history, [draw_image(28, 28)]), (with_history, [draw_image(28, 28)]))

    assert long.input_tokens == short.input_tokens + len("|system|be brief||a cat|||user|sure?|||assistant|")
    assert long.texts != short.texts


async def test_answers_depend_on_the_seed_and_not_on_neighbours(tiny: EngineHarness):
    def row(number: int, seed: int) -> tuple[Request, list]:
        return make_request(number, user_message("hello", 0), temperature=1.0, top_p=0.95, seed=seed), [
            draw_image(40, 40, 1)
        ]

    alone = [(await tiny.ask(row(0, seed)))[0].texts for seed in (1, 2)]
    same, greedy, other, repeated = await tiny.ask(row(0, 1), MIXED[3], row(1, 2), row(2, 1))

    assert [same.texts, other.texts] == alone
    assert repeated.texts == same.texts != other.texts
    assert greedy == (await tiny.ask(MIXED[3]))[0]


async def test_each_turn_samples_independently(internvl: EngineHarness):
    [response] = await internvl.ask(
        (make_request(0, user_message("a"), user_message("a"), temperature=50.0, seed=3), [])
    )

    assert response.texts[0] != response.texts[1]


async def test_stop_strings_span_tokens_and_shorten_the_history(internvl: EngineHarness):
    whole, history = await internvl.ask(
        (make_request(0, user_message("hello", 0)), [draw_image(28, 28)]),
        (make_request(1, user_message("hello", 0), user_message("more")), [draw_image(28, 28)]),
    )
    text = whole.texts[0]
    stop = text[4:7]

    cut, untouched, turns = await internvl.ask(
        (make_request(0, user_message("hello", 0), stop=("nowhere to be found", stop)), [draw_image(28, 28)]),
        (make_request(1, user_message("hello", 0), stop=("nowhere to be found",)), [draw_image(28, 28)]),
        (make_request(2, user_message("hello", 0), user_message("more"), stop=(stop,)), [draw_image(28, 28)]),
    )

    assert cut.texts[0] == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    assert untouched.texts[0] == text
    assert untouched.finish_reason == "length"
    assert turns.texts[0] == cut.texts[0]
    assert turns.input_tokens < history.input_tokens


async def test_end_tokens_end_an_answer_and_are_not_part_of_its_text(internvl: EngineHarness):
    """At a high temperature every token is sampled sooner or later, including the model's end token."""
    sampling = {"temperature": 30.0, "seed": 2, "max_new_tokens": 400}
    ended, sooner = await internvl.ask(
        (make_request(0, user_message("x"), **sampling), []),
        (make_request(1, user_message("x"), **sampling, stop=("<video>", "<img>")), []),
    )

    assert ended.finish_reason == sooner.finish_reason == "stop"
    assert ended.texts[0].startswith(sooner.texts[0])
    assert sooner.output_tokens < ended.output_tokens < 400


async def test_each_row_has_its_own_max_new_tokens(internvl: EngineHarness):
    rows = [
        (make_request(row, user_message("hello", 0), max_new_tokens=count), [draw_image(28, 28)])
        for row, count in enumerate((9, 1, 4))
    ]

    responses = await internvl.ask(*rows)

    assert [response.output_tokens for response in responses] == [9, 1, 4]
    assert {response.finish_reason for response in responses} == {"length"}
    assert responses[0].texts[0].startswith(responses[2].texts[0])


async def test_only_a_row_too_long_for_the_context_fails(internvl: EngineHarness):
    fitting, long, late = await internvl.ask(
        (make_request(0, user_message("hello", 0)), [draw_image(28, 28)]),
        (make_request(1, user_message("x" * CONTEXT)), []),
        (make_request(2, user_message("hello"), user_message("x" * CONTEXT)), []),
    )

    assert fitting.texts
    assert long.failure.code == late.failure.code == "context_length_exceeded"
    assert str(CONTEXT) in long.failure.message
    assert len(late.texts) == 1


async def test_an_answer_ends_where_the_context_does(internvl: EngineHarness):
    [response] = await internvl.ask((make_request(0, user_message("x" * (CONTEXT - 40)), max_new_tokens=400), []))

    assert response.finish_reason == "length"
    assert response.input_tokens + response.output_tokens == CONTEXT


async def test_finished_rows_are_returned_early_and_a_running_row_can_be_aborted(internvl: EngineHarness):
    rows = [
        (make_request(0, user_message("long"), max_new_tokens=450), []),
        (make_request(1, user_message("short"), max_new_tokens=1), []),
    ]
    responses = []

    async for response in internvl.infer(rows):
        responses.append(response)
        await internvl.engine.abort(0)

    assert [response.row for response in responses] == [1, 0]
    assert responses[1].failure == Failure("row_timeout", "engine", "aborted", retryable=True)


async def test_a_pending_row_can_be_aborted(internvl: EngineHarness):
    long = internvl.infer(
        [
            (make_request(0, user_message("long"), max_new_tokens=450), []),
            (make_request(1, user_message("s"), max_new_tokens=1), []),
        ]
    )
    assert (await anext(long)).row == 1
    waiting = internvl.infer([(make_request(2, user_message("x")), []), (make_request(3, user_message("x")), [])])
    first = anext(waiting)  # a coroutine: the requests are sent once it is awaited

    async def abort_soon():
        while internvl.engine.pending < 2:
            await asyncio.sleep(0.001)
        await internvl.engine.abort(2)

    response, _ = await asyncio.gather(first, abort_soon())

    assert response.row == 2
    assert response.failure.code == "row_timeout"
    await internvl.engine.abort(0)
    assert [response.row async for response in long] == [0]
    assert [response.row async for response in waiting] == [3]


async def test_only_the_row_that_breaks_the_model_fails(internvl: EngineHarness):
    question = (make_request(0, user_message("hello", 0)), [draw_image(28, 28)])
    [expected] = await internvl.ask(question)
    broken, *good = [
        await internvl.prepare(make_request(row, user_message("hello", 0)), [draw_image(28, 28)]) for row in (1, 0, 2)
    ]
    [ids] = [tensor for tensor in broken.tensors if tensor.name == "input_ids"]
    internvl.arena.at(broken.extent)[ids.offset : ids.offset + 4] = (10**6).to_bytes(4, "little")  # no such token

    responses = {response.row: response async for response in internvl.engine.infer([good[0], broken, good[1]])}

    assert responses[1].failure.code == "engine_error"
    assert "index out of range" in responses[1].failure.message
    assert responses[0].texts == responses[2].texts == expected.texts


async def test_more_requests_than_a_batch_holds_are_all_answered(models):
    async with start_transformers(models["internvl"], batch_size=3) as started:
        assert started.info.batch_size == 3
        together = await started.ask(*MIXED)
        assert together == await started.ask_each(*MIXED)


async def test_pending_short_batches_are_merged_into_one(models, monkeypatch):
    async with start_transformers(models["internvl"], batch_size=3) as started:
        answer, batches = Generation.answer, []

        def spy(generation, rows, *callbacks):
            batches.append(len(rows))
            answer(generation, rows, *callbacks)

        monkeypatch.setattr(Generation, "answer", spy)
        questions = [(make_request(row, user_message("go on")), []) for row in range(1, 8)]
        first = started.infer([(make_request(0, user_message("a"), max_new_tokens=300), []), questions[0]])
        assert (await anext(first)).row == 1  # so the other is being answered
        short = [asyncio.create_task(started.ask(question)) for question in questions[1:]]
        while started.engine.pending < 6:
            await asyncio.sleep(0.001)
        await started.engine.abort(0)
        assert [response.row async for response in first] == [0]
        assert [[response.row for response in await answered] for answered in short] == [[n] for n in range(2, 8)]
        assert batches == [2, 3, 3]


async def test_bfloat16_goes_through_the_arena(models):
    async with start_transformers(models["qwen2_5_vl"], dtype="bfloat16") as started:
        arrays = started.preparation.prepare(*MIXED[0])
        [response] = await started.ask(MIXED[0])

    assert arrays["pixel_values:bfloat16"].dtype == "uint16"
    assert response.output_tokens == 12
    assert started.info.dtype == "bfloat16"


async def test_engine_info(internvl: EngineHarness):
    info = internvl.info

    assert (info.engine, info.backend, info.dtype, info.context) == ("transformers", "cpu", "float32", CONTEXT)
    assert info.rows == 2 * info.batch_size
    assert len(info.template_sha256) == 64
