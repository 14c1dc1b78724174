"""How answers are sampled, end and fail: the settings that reach LMDeploy's core, and what becomes of its outputs."""

from __future__ import annotations

import asyncio
import json

import pytest
import pytest_asyncio

from batchvl.errors import EngineLost, OptionError, row_errors
from batchvl.ipc.arena import Arena
from batchvl.prompts.sampling import row_seed
from batchvl.shapes import MODEL
from batchvl.types import Row, Sampling
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import LmdeployHarness, lmdeploy_spec, start_lmdeploy

pytestmark = [pytest.mark.lmdeploy, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared():
    async with start_lmdeploy(MODEL, flags={"session_len": 400}) as harness:
        yield harness


@pytest.fixture
def lmdeploy(shared: LmdeployHarness):
    with shared.restored_behaviour() as harness:
        yield harness


async def core_config(lmdeploy: LmdeployHarness, generation: dict | None = None, prompt: str = "hello", **run):
    """Return the GenerationConfig that reaches the core for one row."""
    request = await lmdeploy.ask_once({"prompt": prompt, "generation": generation}, [draw_image(28, 28)], **run)
    return request.config


# ------------------------------------------------------------------------------------------------------------ settings


async def test_greedy_is_greedy(lmdeploy: LmdeployHarness):
    config = await core_config(lmdeploy, max_new_tokens=33)

    assert (config.do_sample, config.top_k, config.repetition_penalty) == (False, 1, 1.0)
    assert config.max_new_tokens == 33
    assert config.stop_token_ids == lmdeploy.model.stop_ids != []


async def test_a_repetition_penalty_works_with_greedy_decoding(lmdeploy: LmdeployHarness):
    """Without do_sample LMDeploy resets it to 1."""
    config = await core_config(lmdeploy, repetition_penalty=1.3)

    assert (config.do_sample, config.top_k, config.repetition_penalty) == (True, 1, 1.3)
    assert config.temperature > 0


async def test_sampling_settings_arrive(lmdeploy: LmdeployHarness):
    config = await core_config(lmdeploy, temperature=0.7, top_p=0.9, top_k=20, repetition_penalty=1.1, seed=5)

    assert config.do_sample
    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (0.7, 0.9, 20, 1.1)
    assert config.random_seed == row_seed(5, 0)


async def test_without_top_k_no_token_is_excluded(lmdeploy: LmdeployHarness):
    """LMDeploy's own default is 50."""
    config = await core_config(lmdeploy, temperature=1.0)

    assert (config.top_k, config.top_p, config.min_p) == (0, 1.0, 0.0)


async def test_a_top_k_above_the_vocabulary_does_not_reach_the_engine(lmdeploy: LmdeployHarness):
    """LMDeploy's PyTorch engine would pass it to torch.topk, which raises, and that would end the engine's loop."""
    config = await core_config(lmdeploy, temperature=1.0, top_k=10**6)

    assert 0 <= config.top_k <= 512, "the model's logits"


async def test_a_row_s_settings_override_the_run_s(lmdeploy: LmdeployHarness):
    row = {"temperature": 1.5, "top_p": 0.5, "top_k": 3, "seed": 77, "max_new_tokens": 9, "repetition_penalty": 1.2}
    config = await core_config(lmdeploy, row, temperature=0.2, seed=1)

    assert (config.temperature, config.top_p, config.top_k, config.repetition_penalty) == (1.5, 0.5, 3, 1.2)
    assert (config.random_seed, config.max_new_tokens) == (77, 9)


async def test_each_row_has_its_own_seed(lmdeploy: LmdeployHarness):
    rows = [lmdeploy.request(Row(number, prompt=f"hello {number}"), temperature=1.0) for number in range(5)]
    lmdeploy.core.requests.clear()
    await lmdeploy.harness.ask(*((row, []) for row in rows))

    seeds = {request.prompt.split("hello ")[1][0]: request.config.random_seed for request in lmdeploy.core.requests}
    assert seeds == {str(number): row_seed(0, number) for number in range(5)}
    assert len(set(seeds.values())) == 5


async def test_an_answer_has_at_most_the_tokens_that_the_context_leaves(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="a" * 1000)
    response, [request] = await lmdeploy.ask("x" * 300, max_new_tokens=2000)

    assert request.config.max_new_tokens == 400 - request.tokens
    assert response.finish_reason == "length"
    assert response.input_tokens + response.output_tokens == 400


async def test_a_temperature_that_lmdeploy_does_not_take_fails_the_row(lmdeploy: LmdeployHarness):
    response, requests = await lmdeploy.ask({"prompt": "hello", "generation": {"temperature": 3}})

    assert (response.failure.code, requests) == ("unsupported", [])
    assert "temperature 3: LMDeploy takes 2 at most" in response.failure.message
    await lmdeploy.idle()


async def test_a_temperature_that_lmdeploy_does_not_take_is_refused_for_a_run():
    from batchvl.engines.lmdeploy import LmdeployEngine

    with pytest.raises(OptionError, match="--temperature 3: LMDeploy takes 2 at most"):
        LmdeployEngine(lmdeploy_spec(MODEL, sampling=Sampling(temperature=3)), Arena(1))


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 2},
        {"temperature": 1e-4},
        {"top_p": 0.001, "temperature": 1},
        {"repetition_penalty": 1e-3},
        {"repetition_penalty": 1e6},
        {"seed": 2**63 - 1, "temperature": 1},
        {"max_new_tokens": 2**31 - 1},
        {"top_k": 2**31 - 1},
        {"top_k": 1, "temperature": 1},
        {"temperature": 1e-7},
    ],
    ids=str,
)
async def test_lmdeploy_takes_every_other_setting_unchanged(lmdeploy: LmdeployHarness, generation):
    from lmdeploy.pytorch.messages import SamplingParam

    config = await core_config(lmdeploy, generation)
    params = SamplingParam.from_gen_config(config)  # its PyTorch engine replaces values that it does not accept

    for name in ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens"):
        assert getattr(params, name) == getattr(config, name)


# ---------------------------------------------------------------------------------------------------------------- ends


async def test_special_tokens_that_stop_are_added_to_the_template_s(tmp_path):
    """LMDeploy drops the template's if a request has any."""
    file = tmp_path / "template.json"
    file.write_text(json.dumps({"user": "Q: ", "eoh": "\n", "assistant": "A: ", "stop_words": ["<|im_start|>"]}))
    async with start_lmdeploy(MODEL, flags={"chat_template": str(file)}) as lmdeploy:
        config = (await lmdeploy.ask_once("hello", stop=("<img>", "###"))).config
        default = (await lmdeploy.ask_once("hello")).config
        tokens = ("<img>", "<|im_start|>", "<|im_end|>")
        ids = {token: lmdeploy.core.tokenizer.convert_tokens_to_ids(token) for token in tokens}

    assert set(config.stop_token_ids) == set(ids.values())
    assert set(default.stop_token_ids) == {ids["<|im_start|>"], ids["<|im_end|>"]}
    assert not config.stop_words


async def test_an_answer_stops_at_a_special_token(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="one <img> two")

    response, _ = await lmdeploy.ask("hello", stop=("<img>",))
    assert (response.texts, response.finish_reason) == (("one ",), "stop")
    whole, _ = await lmdeploy.ask("hello")
    assert whole.texts[0].split() == ["one", "two"]


TEXT = "Once upon a time, there was a cat. The end. And more, for a long time to come."


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ((" time",), "Once upon a"),
        (("The end.",), "Once upon a time, there was a cat. "),
        (("cat", "there"), "Once upon a time, "),
        (("nowhere", "e, th"), "Once upon a tim"),
        (("Once",), ""),
        (("to come.",), TEXT[:-8]),
        (("nowhere",), TEXT),
    ],
    ids=str,
)
async def test_stop_texts_cut_the_answer_wherever_its_tokens_end(lmdeploy: LmdeployHarness, stop, text):
    lmdeploy.core.behaviour.update(answer="text", text=TEXT)
    response, _ = await lmdeploy.ask("hello", stop=stop)

    assert (response.texts, response.finish_reason) == ((text,), "stop")
    await lmdeploy.idle()


async def test_a_stop_text_ends_the_computation_as_well(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="a stop " + "b" * 200, delay=0.02)
    started = asyncio.get_running_loop().time()
    response, _ = await lmdeploy.ask("hello", stop=("stop",), max_new_tokens=250)
    await lmdeploy.idle()

    assert asyncio.get_running_loop().time() - started < 2, "200 tokens would have taken 4 seconds"
    assert response.texts == ("a ",)
    assert response.output_tokens < 20


async def test_the_turn_after_a_stop_text_sees_the_answer_cut(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="one. two. three.")
    response, requests = await lmdeploy.ask(["Who?", "Why?"], stop=(" two",))

    assert response.texts == ("one.", "one.")
    assert "<|im_start|>assistant\none.<|im_end|>" in requests[1].prompt


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("limit", range(1, 13))
async def test_an_answer_that_ends_within_a_character_is_kept_up_to_it(lmdeploy: LmdeployHarness, whole, limit):
    """LMDeploy gives no text at all for an output that ends so, and TurboMind's answer is one output."""
    text = "A fox 🦊 ü"
    tokens = lmdeploy.core.tokenizer.encode(text, add_special_tokens=False)
    expected = lmdeploy.core.tokenizer.decode(tokens[:limit]).rstrip("\N{REPLACEMENT CHARACTER}")
    lmdeploy.core.behaviour.update(answer="text", text=text, whole=whole)
    response, _ = await lmdeploy.ask("hello", max_new_tokens=limit)

    assert response.failure is None
    [answer] = response.texts
    assert answer.strip() == expected.strip()
    assert response.output_tokens == min(limit, len(tokens))


async def test_a_stop_text_in_text_that_lmdeploy_withheld_counts(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="red ## 🦊", whole=False)
    length = len(lmdeploy.core.tokenizer.encode("red ## 🦊", add_special_tokens=False))
    response, _ = await lmdeploy.ask("hello", stop=["##"], max_new_tokens=length - 1)

    assert response.texts == ("red ",)


async def test_the_finish_reason_says_how_an_answer_ended(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour.update(answer="text", text="abcdefgh")
    whole, _ = await lmdeploy.ask("hello")
    short, _ = await lmdeploy.ask("hello", max_new_tokens=3)
    turns, _ = await lmdeploy.ask({"prompt": ["a", "b"], "generation": {"max_new_tokens": 3}})

    assert (whole.texts[0].strip(), whole.finish_reason) == ("abcdefgh", "stop")
    assert (short.finish_reason, short.output_tokens) == ("length", 3)
    assert whole.texts[0].startswith(short.texts[0])
    assert (turns.finish_reason, turns.output_tokens) == ("length", 6)


# ------------------------------------------------------------------------------------------------------------ failures


async def test_every_error_code_of_lmdeploy_is_known():
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
ENGINE_GONE = ("ENGINE_STOP_ERROR", "SESSION_NOT_EXIST", "HANDLER_NOT_EXIST", "NO_QUEUE")


@pytest.mark.parametrize("after", [0, 3], ids=["first output", "later"])
@pytest.mark.parametrize("status", STATUSES)
async def test_an_error_status_fails_the_row(lmdeploy: LmdeployHarness, status, after):
    lmdeploy.core.behaviour["rules"] = {"hello": {"status": status, "after": after}}
    response, _ = await lmdeploy.ask("hello")
    next_response, _ = await lmdeploy.ask("another")

    assert (response.failure.code, response.failure.retryable) == STATUSES[status]
    assert response.finish_reason is None
    assert next_response.failure is None
    await lmdeploy.idle()


async def test_every_status_of_lmdeploy_is_tested():
    from lmdeploy.messages import ResponseType

    assert {status.name for status in ResponseType} == {*STATUSES, *ENGINE_GONE, "SUCCESS", "FINISH"}


@pytest.mark.parametrize("status", ENGINE_GONE)
async def test_an_engine_that_is_gone_ends_the_batch(lmdeploy: LmdeployHarness, status):
    lmdeploy.core.behaviour["rules"] = {"hello": {"status": status}}

    with pytest.raises(EngineLost, match="LMDeploy's engine is gone: The inference engine is unavailable"):
        await lmdeploy.ask("hello")
    await lmdeploy.idle()


async def test_an_exception_of_the_core_fails_the_row_and_is_quoted(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour["rules"] = {"hello": {"raises": "the core broke"}}
    response, _ = await lmdeploy.ask("hello", [draw_image(28, 28)])

    assert (response.failure.code, response.failure.retryable) == ("engine_error", True)
    assert "internal_error" in response.failure.message
    assert "RuntimeError: the core broke" in response.failure.message
    await lmdeploy.idle()


async def test_a_core_without_output_fails_the_row(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour["rules"] = {"hello": {"silent": True}}
    response, _ = await lmdeploy.ask("hello")

    assert response.failure.code == "engine_error"
    await lmdeploy.idle()


async def test_a_prompt_that_exceeds_the_context_is_reported_with_the_limit(lmdeploy: LmdeployHarness):
    long, requests = await lmdeploy.ask("word " * 400, [draw_image(28, 28)])
    late, [first] = await lmdeploy.ask(["short", "word " * 400])

    assert (long.failure.code, long.failure.stage, requests) == ("context_length_exceeded", "engine", [])
    assert "(400)" in long.failure.message
    assert "--session-len" in long.failure.message
    assert late.failure.code == "context_length_exceeded"
    assert len(late.texts) == 1, "the first turn was answered"
    assert late.input_tokens == first.tokens
    await lmdeploy.idle()


async def test_a_failure_among_many_rows_affects_no_other(lmdeploy: LmdeployHarness):
    lmdeploy.core.behaviour["rules"] = {"bad": {"status": "INTERNAL_ENGINE_ERROR"}, "odd": {"raises": "broken"}}
    prompts = ["bad" if number % 7 == 3 else "odd" if number % 7 == 5 else f"good {number}" for number in range(40)]
    requests = [lmdeploy.request(Row(number, prompt=prompt)) for number, prompt in enumerate(prompts)]

    responses = await lmdeploy.harness.ask(*((request, []) for request in requests))

    assert [response.failure is None for response in responses] == [prompt.startswith("good") for prompt in prompts]
    await lmdeploy.idle()
