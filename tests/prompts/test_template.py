from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.config.options import PromptOptions, SamplingOptions
from batchvl.errors import ManifestError, OptionError, PromptError
from batchvl.prompts.sampling import row_seed
from batchvl.prompts.template import IMAGE_TOKEN, Prompter, template_columns
from batchvl.types import FileImage, Message, Request, Row, Sampling

SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</s>", "x")


def images(count: int) -> tuple[FileImage, ...]:
    return tuple(FileImage(f"{number}.jpg") for number in range(count))


def prompter(**options: Any) -> Prompter:
    run = SamplingOptions(seed=3, temperature=0.5, stop=("###",))
    return Prompter(PromptOptions(**options), run, SPECIAL)


def request(row: Row, **options: Any) -> Request:
    return prompter(**options).request(row)


def shown(message: Message) -> str:
    """A message's parts in a line; `[0]` is picture 0."""
    return "|".join(f"[{part.image}]" if part.text is None else part.text for part in message.parts)


def asked(row: Row, **options: Any) -> list[str]:
    found = request(row, **options)
    assert all(message.role == "user" for message in (*found.messages, *found.followups))
    return [shown(message) for message in (*found.messages, *found.followups)]


def refused(row: Row, **options: Any) -> tuple[str, str]:
    with pytest.raises(PromptError) as error:
        request(row, **options)
    return error.value.code, str(error.value)


# Where the prompt comes from


def test_the_prompt_is_the_operators_else_the_rows_else_a_default() -> None:
    row = Row(0, prompt="own", images=images(1))
    assert asked(row) == ["[0]|own"]
    assert asked(row, prompt="all") == ["[0]|all"]
    assert asked(Row(0, images=images(1))) == ["[0]|describe this image"]
    assert asked(Row(0, messages=[{"role": "user", "content": "chat"}], images=images(1))) == ["[0]|chat"]
    assert asked(Row(0, messages=[{"role": "user", "content": "chat"}]), prompt="all") == ["all"]


@pytest.mark.parametrize("prompt", ["", " \n", [], ["a", ""]])
def test_a_null_or_empty_prompt_fails(prompt: Any) -> None:
    code, message = refused(Row(0, prompt=prompt, images=images(1)))
    assert code == "missing_prompt"
    assert ("of turn 2" in message) == (prompt == ["a", ""])
    assert refused(Row(0, prompt=prompt, images=images(1)), prompt="Say: {prompt}")[0] == "missing_prompt"
    assert asked(Row(0, prompt=prompt), prompt="all") == ["all"]


def test_neither_a_prompt_nor_a_picture_fails() -> None:
    assert refused(Row(0)) == ("missing_prompt", "neither a prompt nor a picture")


def test_prompts_in_a_list_are_turns() -> None:
    found = request(Row(4, prompt=["one", "two", "three"], images=images(2)), system="Be brief.")
    assert [(message.role, shown(message)) for message in found.messages] == [
        ("system", "Be brief."),
        ("user", "[0]|[1]|one"),
    ]
    assert [shown(message) for message in found.followups] == ["two", "three"]
    assert asked(Row(0, prompt=["a", "b"]), prompt="{prompt}!") == ["a!", "b!"]


# Templates


@pytest.mark.parametrize(
    ("template", "names"),
    [
        ("{caption} {url} {caption}", ("caption", "url")),
        ('{"json": 1} {} {a.b} {a[0]} {0} { caption } {a b}', ()),
        ('{"key": {caption}, "other": {{literal}}}', ("caption",)),
        ("{{caption}}", ("caption",)),
        ("{odd name.1}", ("odd name.1",)),
        ("no braces } {", ()),
    ],
)
def test_columns_of_a_template(template: str, names: tuple[str, ...]) -> None:
    assert template_columns(template, ["caption", "url", "odd name.1"]) == names


def test_a_name_that_is_no_column_is_told() -> None:
    with pytest.raises(
        ManifestError, match=r"--prompt: no column 'captoin' for \{captoin\}; the columns are 'caption', 'id'"
    ):
        template_columns("{captoin}", ["caption", "id"])


def test_only_columns_are_substituted_and_only_once() -> None:
    row = Row(0, prompt="{a} {b}", columns={"a": "{b}", "b": "{a}{prompt}", "n": 5, "l": ["ü", True]})
    template = '{a} {b} {prompt} {n} {l} {c} {} {a.b} {a[0]} {{a}} {"a": 1}'
    want = '{b} {a}{prompt} {a} {b} 5 ["ü", true] {c} {} {a.b} {a[0]} {{b}} {"a": 1}'
    assert asked(row, prompt=template) == [want]


def test_a_null_column_that_the_template_names_fails() -> None:
    code, message = refused(Row(0, columns={"caption": None}), prompt="{caption}?")
    assert (code, "'caption'" in message) == ("missing_prompt", True)
    assert asked(Row(0, columns={"caption": ""}), prompt="{caption}?") == ["?"]


# Places of pictures


def test_pictures_go_first_unless_placed() -> None:
    assert asked(Row(0, prompt="a", images=images(2))) == ["[0]|[1]|a"]
    assert asked(Row(0, prompt=f"a{IMAGE_TOKEN}b{IMAGE_TOKEN}", images=images(2))) == ["a|[0]|b|[1]"]
    turns = [f"{IMAGE_TOKEN} one", "none", f"two {IMAGE_TOKEN}"]
    assert asked(Row(0, prompt=turns, images=images(2))) == ["[0]| one", "none", "two |[1]"]


def test_pictures_are_numbered_where_they_go_first() -> None:
    row = Row(0, prompt="a", images=images(2))
    assert asked(row, number_images=True) == ["Image-1: |[0]|\nImage-2: |[1]|\na"]
    assert asked(Row(0, prompt="a"), number_images=True) == ["a"]
    assert asked(Row(0, prompt=f"a{IMAGE_TOKEN}", images=images(1)), number_images=True) == ["a|[0]"]


@pytest.mark.parametrize(("prompt", "count"), [(IMAGE_TOKEN, 0), (IMAGE_TOKEN, 2), ([IMAGE_TOKEN, IMAGE_TOKEN], 1)])
def test_as_many_places_as_pictures(prompt: Any, count: int) -> None:
    places = 2 if isinstance(prompt, list) else 1
    code, message = refused(Row(0, prompt=prompt, images=images(count)))
    assert code == "image_count_mismatch"
    assert f"found {places} {IMAGE_TOKEN}, want {count}" in message


def test_the_token_counts_in_the_template_and_the_prompt_not_in_values() -> None:
    row = Row(0, prompt=f"p{IMAGE_TOKEN}", images=images(2), columns={"v": f"v{IMAGE_TOKEN}"})
    assert asked(row, prompt=IMAGE_TOKEN + "{prompt} {v}") == ["[0]|p|[1]| v< IMAGE_TOKEN>"]
    # Neither do halves that only meet in the template.
    row = Row(0, prompt="p", images=images(1), columns={"v": "TOKEN"})
    assert asked(row, prompt="<IMAGE_{v}>") == ["[0]|< IMAGE_TOKEN>"]


def test_the_system_message_holds_no_picture() -> None:
    with pytest.raises(OptionError, match="--system"):
        prompter(system=IMAGE_TOKEN)
    with pytest.raises(OptionError, match="--prompt: is empty"):
        prompter(prompt=" ")


# Special tokens


def test_special_tokens_of_a_row_are_escaped_and_the_operators_are_not() -> None:
    row = Row(0, prompt="a<|im_end|>", columns={"v": "</s>x", "h": "end|>"})
    assert asked(row) == ["a< |im_end|>"]
    template = "<|im_end|>{prompt}{v}</s><|im_{h}"
    assert asked(row, prompt=template) == ["<|im_end|>a< |im_end|>< /s>x</s>< |im_end|>"]
    chat = [{"role": role, "content": "<img>"} for role in ("system", "user", "assistant", "user")]
    assert [shown(message) for message in request(Row(0, messages=chat)).messages] == ["< img>"] * 4
    assert [shown(m) for m in request(row, system="<img>").messages] == ["<img>", "a< |im_end|>"]


def test_tokens_that_overlap_are_all_escaped() -> None:
    found = Prompter(PromptOptions(), SamplingOptions(), ["<ab", "b><", "><c>", "<<ab"])
    (message,) = found.request(Row(0, prompt="<<ab><c>")).messages
    assert shown(message) == "< < ab > <c>"
    assert not any(token in shown(message) for token in found.special_tokens)


def test_special_tokens_can_be_refused() -> None:
    code, message = refused(Row(0, prompt="a</s>"), special_tokens="fail")
    assert (code, "'</s>'" in message) == ("special_token", True)
    row = Row(0, images=images(1), columns={"v": IMAGE_TOKEN})
    assert refused(row, special_tokens="fail", prompt="{v}")[0] == "special_token"
    assert asked(Row(0, prompt=IMAGE_TOKEN, images=images(1)), special_tokens="fail") == ["[0]"]
    assert asked(Row(0), special_tokens="fail", prompt="</s>") == ["</s>"]


pieces = st.sampled_from([*SPECIAL, IMAGE_TOKEN, "<|im_", "end|>", "<", "|", "{v}", "{prompt}", "{", "}", "text", " "])
texts = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=300, deadline=None)
@given(texts, texts, texts, st.integers(0, 3))
def test_no_special_token_comes_from_a_row(literal: str, prompt: str, value: str, count: int) -> None:
    row = Row(0, prompt=prompt, images=images(count), columns={"v": value})
    for options, own in (({}, ""), ({"prompt": literal + "{v}{prompt}"}, literal)):
        try:
            found = request(row, **options)
        except PromptError:
            continue
        (message,) = found.messages
        text = "|".join(part.text for part in message.parts if part.text is not None)
        for token in SPECIAL[:-1]:
            assert text.count(token) <= own.count(token)
        assert IMAGE_TOKEN not in text
        assert [part.image for part in message.parts if part.image is not None] == list(range(count))


# Messages


def test_messages_place_pictures_by_parts() -> None:
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": f"d{IMAGE_TOKEN}"}]},
    ]
    found = request(Row(0, messages=chat, images=images(1)), system="unused").messages
    assert [(message.role, shown(message)) for message in found] == [
        ("system", "s"),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("user", "[0]|d< IMAGE_TOKEN>"),
    ]


def test_pictures_of_the_column_lead_the_first_user_message() -> None:
    chat: list[Any] = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
    chat += [{"role": "assistant", "content": ""}, {"role": "user", "content": [{"type": "image", "image": 2}]}]
    found = request(Row(0, messages=chat, images=images(3)), system="s").messages
    assert [shown(message) for message in found] == ["s", "hi", "[0]|[1]|a", "", "[2]"]
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    found = request(Row(0, messages=plain, images=images(2))).messages
    assert [shown(message) for message in found] == ["[0]|[1]|a", "b", "c"]
    plain[2]["content"] = f"c {IMAGE_TOKEN}"
    found = request(Row(0, messages=plain, images=images(1))).messages
    assert [shown(message) for message in found] == ["a", "b", "c |[0]"]


@pytest.mark.parametrize(
    ("messages", "code", "told"),
    [
        ([], "invalid_messages", "end with nothing, want the user's turn"),
        (["a"], "invalid_messages", "messages[0]: found str, want an object"),
        ([{"role": "user"}], "invalid_messages", "found content of type NoneType"),
        ([{"role": "tool", "content": "a"}], "invalid_messages", "found role 'tool', want system, user or assistant"),
        ([{"content": "a"}], "invalid_messages", "found role None"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "invalid_messages",
            "with assistant",
        ),
        ([{"role": "system", "content": "a"}], "invalid_messages", "end with system"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "invalid_messages", "messages[1]"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "invalid_messages", "type 'audio', want text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "invalid_messages", "type 'text'"),
        ([{"role": "user", "content": ["a"]}], "invalid_messages", "type 'str'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "invalid_messages", "type 'image'"),
        ([{"role": "user", "content": []}], "missing_prompt", "last message is empty"),
        ([{"role": "user", "content": " "}], "missing_prompt", "last message is empty"),
        ([{"role": "user", "content": [{"type": "image", "image": 0}]}], "image_count_mismatch", "found 1 picture"),
        ([{"role": "user", "content": IMAGE_TOKEN}], "image_count_mismatch", "found 1 <IMAGE_TOKEN>, want 0"),
    ],
)
def test_messages_that_are_no_chat_fail(messages: Any, code: str, told: str) -> None:
    found, message = refused(Row(0, messages=messages))
    assert found == code
    assert told in message


def test_a_picture_in_an_answer_fails() -> None:
    chat = [{"role": "assistant", "content": [{"type": "image", "image": 0}]}, {"role": "user", "content": "a"}]
    assert refused(Row(0, messages=chat, images=images(1)))[0] == "invalid_messages"


# Sampling


def test_sampling_is_the_runs_with_a_seed_per_row() -> None:
    found = request(Row(12, prompt="a")).sampling
    assert found == Sampling(temperature=0.5, stop=("###",), seed=row_seed(3, 12))
    # Stored answers depend on it: a change here is a change of what seeds mean.
    assert row_seed(3, 12) == 5966764642074109582
    assert len({row_seed(seed, number) for seed in range(10) for number in range(100)}) == 1000
    assert all(0 <= row_seed(0, number) < 2**63 for number in range(1000))


def test_a_rows_generation_wins() -> None:
    given = {"max_tokens": 7.0, "temperature": 1, "top_p": 0.5, "top_k": 4, "repetition_penalty": 1.5, "seed": 9}
    found = request(Row(0, prompt="a", generation={**given, "stop": "x"})).sampling
    assert found == Sampling(7, 1.0, 0.5, 4, 1.5, 9, ("x",))
    assert request(Row(0, prompt="a", generation={"stop": ["x", "y"]})).sampling.stop == ("x", "y")
    assert request(Row(0, prompt="a", generation={"max_completion_tokens": 3})).sampling.max_new_tokens == 3


@pytest.mark.parametrize(
    ("generation", "told"),
    [
        ({"max_length": 5}, "unknown setting 'max_length'; want max_new_tokens, temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens: want a whole number >= 1; found 0"),
        ({"max_tokens": "5"}, "max_tokens: want a whole number; found '5'"),
        ({"max_tokens": 5.5}, "max_tokens: "),
        ({"max_tokens": True}, "max_tokens: "),
        ({"max_tokens": 5, "max_new_tokens": 5}, "both given"),
        ({"temperature": -0.1}, "temperature: want a number >= 0"),
        ({"temperature": float("nan")}, "temperature: "),
        ({"temperature": float("inf")}, "temperature: "),
        ({"top_p": 0}, "top_p: "),
        ({"top_p": 1.1}, "top_p: "),
        ({"top_k": -1}, "top_k: "),
        ({"top_k": 2**70}, "top_k: "),
        ({"repetition_penalty": 0}, "repetition_penalty: "),
        ({"seed": 2**63}, "seed: want a whole number <= 9223372036854775807; found 9223372036854775808"),
        ({"stop": [1]}, "stop: "),
        ({"stop": ""}, "stop: found an empty string"),
        ({"seed": {"a": 1}}, "seed: "),
    ],
)
def test_bad_settings_fail_and_are_named(generation: dict[str, Any], told: str) -> None:
    code, message = refused(Row(0, prompt="a", generation=generation))
    assert code == "invalid_generation"
    assert told in message


@given(st.dictionaries(st.sampled_from(["seed", "top_k", "temperature", "max_tokens"]), st.integers() | st.floats()))
def test_any_settings_give_a_request_that_can_be_sent_or_a_failure(generation: dict[str, Any]) -> None:
    try:
        found = request(Row(0, prompt="a", generation=generation))
    except PromptError:
        return
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Request) == found
