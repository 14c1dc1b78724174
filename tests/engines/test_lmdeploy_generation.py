"""How answers are drawn, end and fail: the settings that reach LMDeploy's core, and what becomes of what it says."""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio

from batchvl.errors import EngineLost, OptionError, row_errors
from batchvl.ipc.arena import Arena
from batchvl.prompts.sampling import row_seed
from batchvl.shapes import MODEL
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import CoreLine, spec, with_core

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine():
    async with with_core(MODEL, flags={"session_len": 400}) as started:
        yield started


@pytest.fixture
def line(engine: CoreLine):
    """The engine; what a test orders of its core is taken back."""
    with engine.ordered_back() as found:
        yield found


async def settings(line: CoreLine, generation: dict | None = None, prompt: str = "hello", **run):
    """The GenerationConfig of one row that the core answered."""
    return (await line.asked({"prompt": prompt, "generation": generation}, [picture(28, 28)], **run)).config


# ------------------------------------------------------------------------------------------------------------ settings


async def test_greedy_is_greedy(line: CoreLine):
    config = await settings(line, max_new_tokens=33)

    assert (config.do_sample, config.top_k, config.repetition_penalty) == (False, 1, 1.0)
    assert config.max_new_tokens == 33
    assert config.stop_token_ids == line.loaded.stop_ids != []


async def test_a_repetition_penalty_outlives_greedy_decoding(line: CoreLine):
    """Without do_sample LMDeploy sets it back to 1."""
    config = await settings(line, repetition_penalty=1.3)

    assert (config.do_sample, config.top_k, config.repetition_penalty) == (True, 1, 1.3)
    assert config.temperature > 0


async def test_drawn_answers_are_drawn_as_told(line: CoreLine):
    config = await settings(line, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, seed=5)

    assert config.do_sample
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (0.7, 0.9, 20, 1.1)
    assert config.random_seed == row_seed(5, 0)


async def test_without_top_k_no_token_is_left_out(line: CoreLine):
    """LMDeploy's own default is 50."""
    config = await settings(line, temperature=1.0)

    assert (config.top_k, config.top_p, config.min_p) == (0, 1.0, 0.0)


async def test_a_top_k_of_more_tokens_than_there_are_does_not_reach_the_engine(line: CoreLine):
    """LMDeploy's PyTorch engine hands it to torch.topk, which raises, and the engine's loop ends with it."""
    config = await settings(line, temperature=1.0, top_k=10**6)

    assert 0 <= config.top_k <= 512, "the model's logits"


async def test_a_row_s_own_settings_win(line: CoreLine):
    own = {"temperature": 1.5, "top_p": 0.5, "top_k": 3, "seed": 77, "max_new_tokens": 9, "repetition_penalty": 1.2}
    config = await settings(line, own, temperature=0.2, seed=1)

    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (1.5, 0.5, 3, 1.2)
    assert (config.random_seed, config.max_new_tokens) == (77, 9)


async def test_each_row_draws_with_its_own_seed(line: CoreLine):
    from batchvl.types import Row

    rows = [line.request(Row(number, prompt=f"hello {number}"), temperature=1.0) for number in range(5)]
    line.core.asked.clear()
    await line.line.ask(*((row, []) for row in rows))

    seeds = {asked.prompt.split("hello ")[1][0]: asked.config.random_seed for asked in line.core.asked}
    assert seeds == {str(number): row_seed(0, number) for number in range(5)}
    assert len(set(seeds.values())) == 5


async def test_an_answer_has_no_more_tokens_than_the_context_leaves(line: CoreLine):
    line.core.behaviour.update(answer="say", say="a" * 1000)
    response, [asked] = await line.ask("x" * 300, max_new_tokens=2000)

    assert asked.config.max_new_tokens == 400 - asked.tokens
    assert response.finish_reason == "length"
    assert response.input_tokens + response.output_tokens == 400


async def test_a_temperature_that_lmdeploy_does_not_take_is_the_row_s_failure(line: CoreLine):
    response, asked = await line.ask({"prompt": "hello", "generation": {"temperature": 3}})

    assert (response.failure.code, asked) == ("unsupported", [])
    assert "temperature 3: LMDeploy takes 2 at most" in response.failure.message
    await line.idle()


async def test_a_temperature_that_lmdeploy_does_not_take_is_refused_for_a_run():
    from batchvl.engines.lmdeploy import LmdeployEngine
    from batchvl.types import Sampling

    with pytest.raises(OptionError, match="--temperature 3: LMDeploy takes 2 at most"):
        LmdeployEngine(spec(MODEL, sampling=Sampling(temperature=3)), Arena(1))


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 2}, {"temperature": 1e-4}, {"top_p": 0.001, "temperature": 1}, {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e6}, {"seed": 2**63 - 1, "temperature": 1}, {"max_new_tokens": 2**31 - 1},
        {"top_k": 2**31 - 1}, {"top_k": 1, "temperature": 1}, {"temperature": 1e-7},
    ],
    ids=str,
)  # fmt: skip
async def test_whatever_a_row_may_ask_for_lmdeploy_takes(line: CoreLine, generation):
    from lmdeploy.pytorch.messages import SamplingParam

    config = await settings(line, generation)
    taken = SamplingParam.from_gen_config(config)  # what its PyTorch engine makes of it: values it dislikes it replaces

    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"):
        assert getattr(taken, name) == getattr(config, name)


# ---------------------------------------------------------------------------------------------------------------- ends


async def test_a_special_token_that_stops_joins_the_template_s_own(tmp_path):
    """LMDeploy forgets the template's where a request brings any."""
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"user": "Q: ", "eoh": "\n", "assistant": "A: ", "stop_words": ["<|im_start|>"]}))
    async with with_core(MODEL, flags={"chat_template": str(mine)}) as line:
        config = (await line.asked("hello", stop=("<img>", "###"))).config
        plain = (await line.asked("hello")).config
        ids = {
            token: line.core.tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "<|im_start|>", "<|im_end|>")
        }

    assert set(config.stop_token_ids) == set(ids.values())
    assert set(plain.stop_token_ids) == {ids["<|im_start|>"], ids["<|im_end|>"]}
    assert not config.stop_words


async def test_an_answer_stops_at_a_special_token(line: CoreLine):
    line.core.behaviour.update(answer="say", say="one <img> two")

    response, _ = await line.ask("hello", stop=("<img>",))
    assert (response.texts, response.finish_reason) == (("one ",), "stop")
    whole, _ = await line.ask("hello")
    assert whole.texts[0].split() == ["one", "two"]


SAID = "Once upon a time, there was a cat. The end. And more, for a long time to come."


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((" time",), "Once upon a"), (("The end.",), "Once upon a time, there was a cat. "),
        (("cat", "there"), "Once upon a time, "), (("nowhere", "e, th"), "Once upon a tim"), (("Once",), ""),
        (("to come.",), SAID[:-8]), (("nowhere",), SAID),
    ],
    ids=str,
)  # fmt: skip
async def test_stop_texts_cut_the_answer_wherever_its_tokens_end(line: CoreLine, stop, text):
    line.core.behaviour.update(answer="say", say=SAID)
    response, _ = await line.ask("hello", stop=stop)

    assert (response.texts, response.finish_reason) == ((text,), "stop")
    await line.idle()


async def test_a_stop_text_ends_the_work_as_well(line: CoreLine):
    line.core.behaviour.update(answer="say", say="a stop " + "b" * 200, delay=0.02)
    started = asyncio.get_running_loop().time()
    response, _ = await line.ask("hello", stop=("stop",), max_new_tokens=250)
    await line.idle()

    assert asyncio.get_running_loop().time() - started < 2, "200 tokens would have taken 4 seconds"
    assert response.texts == ("a ",)
    assert response.output_tokens < 20


async def test_the_turn_after_a_stop_text_sees_the_answer_cut(line: CoreLine):
    line.core.behaviour.update(answer="say", say="one. two. three.")
    response, asked = await line.ask(["Who?", "Why?"], stop=(" two",))

    assert response.texts == ("one.", "one.")
    assert "<|im_start|>assistant\none.<|im_end|>" in asked[1].prompt


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("limit", range(1, 13))
async def test_an_answer_that_is_cut_within_a_character_is_kept_up_to_it(line: CoreLine, whole, limit):
    """LMDeploy gives no text at all of an output that ends so, and TurboMind's answer is one output."""
    said = "A fox 🦊 ü"
    tokens = line.core.tokenizer.encode(said, add_special_tokens=False)
    expected = line.core.tokenizer.decode(tokens[:limit]).rstrip("\N{REPLACEMENT CHARACTER}")
    line.core.behaviour.update(answer="say", say=said, whole=whole)
    response, _ = await line.ask("hello", max_new_tokens=limit)

    assert response.failure is None
    [text] = response.texts
    assert text.strip() == expected.strip()
    assert response.output_tokens == min(limit, len(tokens))


async def test_a_stop_text_in_an_end_that_lmdeploy_withheld_counts(line: CoreLine):
    line.core.behaviour.update(answer="say", say="red ## 🦊", whole=False)
    length = len(line.core.tokenizer.encode("red ## 🦊", add_special_tokens=False))
    response, _ = await line.ask("hello", stop=["##"], max_new_tokens=length - 1)

    assert response.texts == ("red ",)


async def test_how_an_answer_ended_is_told(line: CoreLine):
    line.core.behaviour.update(answer="say", say="abcdefgh")
    whole, _ = await line.ask("hello")
    short, _ = await line.ask("hello", max_new_tokens=3)
    turns, _ = await line.ask({"prompt": ["a", "b"], "generation": {"max_new_tokens": 3}})

    assert (whole.texts[0].strip(), whole.finish_reason) == ("abcdefgh", "stop")
    assert (short.finish_reason, short.output_tokens) == ("length", 3)
    assert whole.texts[0].startswith(short.texts[0])
    assert (turns.finish_reason, turns.output_tokens) == ("length", 6)


# ------------------------------------------------------------------------------------------------------------ failures


async def test_every_error_of_lmdeploy_s_is_known():
    from lmdeploy.serve.core import ErrorCode

    from batchvl.engines.lmdeploy.conversation import ROW_ERRORS

    assert {code.value for code in ErrorCode} == {*ROW_ERRORS, "engine_unavailable"}
    assert set(ROW_ERRORS.values()) <= set(row_errors())


STATUSES = {
    "INPUT_LENGTH_ERROR": ("context_length_exceeded", False),
    "NOT_SUPPORTED": ("unsupported", False),
    "SESSION_REPEAT": ("engine_error", True),
    "PREFIX_CACHE_CONFLICT": ("engine_error", True),
    "INTERNAL_ENGINE_ERROR": ("engine_error", True),
    "OUT_OF_MEMORY": ("engine_error", True),
    "CANCEL": ("engine_error", True),
}


@pytest.mark.parametrize("after", [0, 3], ids=["at once", "in the middle"])
@pytest.mark.parametrize("status", STATUSES)
async def test_what_the_core_answers_instead_is_the_row_s_failure(line: CoreLine, status, after):
    line.core.behaviour["rules"] = {"hello": {"status": status, "after": after}}
    response, _ = await line.ask("hello")
    next_one, _ = await line.ask("another")

    assert (response.failure.code, response.failure.retryable) == STATUSES[status]
    assert response.finish_reason is None
    assert next_one.failure is None
    await line.idle()


async def test_every_status_of_the_core_is_tried():
    from lmdeploy.messages import ResponseType

    gone = {"ENGINE_STOP_ERROR", "SESSION_NOT_EXIST", "HANDLER_NOT_EXIST", "NO_QUEUE"}
    assert {status.name for status in ResponseType} == {*STATUSES, *gone, "SUCCESS", "FINISH"}


@pytest.mark.parametrize("status", ["ENGINE_STOP_ERROR", "SESSION_NOT_EXIST", "HANDLER_NOT_EXIST", "NO_QUEUE"])
async def test_an_engine_that_is_gone_ends_the_list(line: CoreLine, status):
    line.core.behaviour["rules"] = {"hello": {"status": status}}

    with pytest.raises(EngineLost, match="LMDeploy's engine is gone: The inference engine is unavailable"):
        await line.ask("hello")
    await line.idle()


async def test_a_core_that_raises_fails_the_row_and_quotes_it(line: CoreLine):
    line.core.behaviour["rules"] = {"hello": {"raises": "the core broke by order"}}
    response, _ = await line.ask("hello", [picture(28, 28)])

    assert (response.failure.code, response.failure.retryable) == ("engine_error", True)
    assert "internal_error" in response.failure.message
    assert "RuntimeError: the core broke by order" in response.failure.message
    await line.idle()


async def test_a_core_that_says_nothing_fails_the_row(line: CoreLine):
    line.core.behaviour["rules"] = {"hello": {"silent": True}}
    response, _ = await line.ask("hello")

    assert response.failure.code == "engine_error"
    await line.idle()


async def test_a_prompt_longer_than_the_context_is_told_with_both_lengths(line: CoreLine):
    long, asked = await line.ask("word " * 400, [picture(28, 28)])
    late, [first] = await line.ask(["short", "word " * 400])

    assert (long.failure.code, long.failure.stage, asked) == ("context_length_exceeded", "engine", [])
    assert "(400)" in long.failure.message
    assert "--session-len" in long.failure.message
    assert late.failure.code == "context_length_exceeded"
    assert len(late.texts) == 1, "the first turn was answered"
    assert late.input_tokens == first.tokens
    await line.idle()


async def test_a_failure_among_many_rows_is_its_row_s_alone(line: CoreLine):
    from batchvl.types import Row

    line.core.behaviour["rules"] = {"bad": {"status": "INTERNAL_ENGINE_ERROR"}, "odd": {"raises": "by order"}}
    prompts = ["bad" if number % 7 == 3 else "odd" if number % 7 == 5 else f"good {number}" for number in range(40)]
    requests = [line.request(Row(number, prompt=prompt)) for number, prompt in enumerate(prompts)]

    responses = await line.line.ask(*((request, []) for request in requests))

    assert [response.failure is None for response in responses] == [prompt.startswith("good") for prompt in prompts]
    await line.idle()
