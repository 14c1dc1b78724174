"""Requests from rows: prompts, templates, places of images, special tokens and messages."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchvl.config.options import PromptOptions, SamplingOptions
from batchvl.errors import ManifestError, OptionError, PromptError
from batchvl.prompts.prompter import Prompter
from batchvl.prompts.template import template_columns
from batchvl.prompts.tokens import IMAGE_TOKEN
from batchvl.types import FileImage, Message, Request, Row
from tests.fuzzing import examples

SPECIAL = ("<|im_start|>", "<|im_end|>", "<img>", "</s>", "x")


def images(count: int) -> tuple[FileImage, ...]:
    return tuple(FileImage(f"{number}.jpg") for number in range(count))


def prompter(**options: Any) -> Prompter:
    run = SamplingOptions(seed=3, temperature=0.5, stop=("###",))
    return Prompter(PromptOptions(**options), run, SPECIAL)


def request(row: Row, **options: Any) -> Request:
    return prompter(**options).request(row)


def shown(message: Message) -> str:
    """Return a message's parts in one line; `[0]` is image 0."""
    return "|".join(f"[{part.image}]" if part.text is None else part.text for part in message.parts)


def texts_of(row: Row, **options: Any) -> list[str]:
    made = request(row, **options)
    assert all(message.role == "user" for message in (*made.messages, *made.followups))
    return [shown(message) for message in (*made.messages, *made.followups)]


def error_of(row: Row, **options: Any) -> tuple[str, str]:
    with pytest.raises(PromptError) as error:
        request(row, **options)
    return error.value.code, str(error.value)


# Where the prompt comes from


def test_the_prompt_is_the_options_or_the_rows_or_a_default() -> None:
    row = Row(0, prompt="own", images=images(1))
    assert texts_of(row) == ["[0]|own"]
    assert texts_of(row, prompt="all") == ["[0]|all"]
    assert texts_of(Row(0, images=images(1))) == ["[0]|describe this image"]
    assert texts_of(Row(0, messages=[{"role": "user", "content": "chat"}], images=images(1))) == ["[0]|chat"]
    assert texts_of(Row(0, messages=[{"role": "user", "content": "chat"}]), prompt="all") == ["all"]


@pytest.mark.parametrize("prompt", ["", " \n", [], ["a", ""]])
def test_a_null_or_empty_prompt_fails(prompt: Any) -> None:
    code, message = error_of(Row(0, prompt=prompt, images=images(1)))
    assert code == "missing_prompt"
    assert ("of turn 2" in message) == (prompt == ["a", ""])
    assert error_of(Row(0, prompt=prompt, images=images(1)), prompt="Say: {prompt}")[0] == "missing_prompt"
    assert texts_of(Row(0, prompt=prompt), prompt="all") == ["all"]


def test_neither_a_prompt_nor_an_image_fails() -> None:
    assert error_of(Row(0)) == ("missing_prompt", "found neither a prompt nor an image")


def test_a_list_of_prompts_is_a_conversation() -> None:
    made = request(Row(4, prompt=["one", "two", "three"], images=images(2)), system="Be brief.")
    assert [(message.role, shown(message)) for message in made.messages] == [
        ("system", "Be brief."),
        ("user", "[0]|[1]|one"),
    ]
    assert [shown(message) for message in made.followups] == ["two", "three"]
    assert texts_of(Row(0, prompt=["a", "b"]), prompt="{prompt}!") == ["a!", "b!"]


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


def test_an_unknown_column_in_a_template() -> None:
    with pytest.raises(
        ManifestError, match=r"--prompt: no column 'captoin' for \{captoin\}; the columns are 'caption', 'id'"
    ):
        template_columns("{captoin}", ["caption", "id"])


def test_only_columns_are_substituted_and_only_once() -> None:
    row = Row(0, prompt="{a} {b}", columns={"a": "{b}", "b": "{a}{prompt}", "n": 5, "l": ["ü", True]})
    template = '{a} {b} {prompt} {n} {l} {c} {} {a.b} {a[0]} {{a}} {"a": 1}'
    expected = '{b} {a}{prompt} {a} {b} 5 ["ü", true] {c} {} {a.b} {a[0]} {{b}} {"a": 1}'
    assert texts_of(row, prompt=template) == [expected]


def test_a_null_column_that_the_template_names_fails() -> None:
    code, message = error_of(Row(0, columns={"caption": None}), prompt="{caption}?")
    assert (code, "'caption'" in message) == ("missing_prompt", True)
    assert texts_of(Row(0, columns={"caption": ""}), prompt="{caption}?") == ["?"]


# Places of images


def test_images_go_first_unless_placed() -> None:
    assert texts_of(Row(0, prompt="a", images=images(2))) == ["[0]|[1]|a"]
    assert texts_of(Row(0, prompt=f"a{IMAGE_TOKEN}b{IMAGE_TOKEN}", images=images(2))) == ["a|[0]|b|[1]"]
    turns = [f"{IMAGE_TOKEN} one", "none", f"two {IMAGE_TOKEN}"]
    assert texts_of(Row(0, prompt=turns, images=images(2))) == ["[0]| one", "none", "two |[1]"]


def test_leading_images_are_numbered() -> None:
    row = Row(0, prompt="a", images=images(2))
    assert texts_of(row, number_images=True) == ["Image-1: |[0]|\nImage-2: |[1]|\na"]
    assert texts_of(Row(0, prompt="a"), number_images=True) == ["a"]
    assert texts_of(Row(0, prompt=f"a{IMAGE_TOKEN}", images=images(1)), number_images=True) == ["a|[0]"]


@pytest.mark.parametrize(("prompt", "count"), [(IMAGE_TOKEN, 0), (IMAGE_TOKEN, 2), ([IMAGE_TOKEN, IMAGE_TOKEN], 1)])
def test_as_many_places_as_images(prompt: Any, count: int) -> None:
    places = 2 if isinstance(prompt, list) else 1
    code, message = error_of(Row(0, prompt=prompt, images=images(count)))
    assert code == "image_count_mismatch"
    assert f"found {places} {IMAGE_TOKEN}, expected {count}" in message


def test_the_token_counts_in_the_template_and_the_prompt_not_in_values() -> None:
    row = Row(0, prompt=f"p{IMAGE_TOKEN}", images=images(2), columns={"v": f"v{IMAGE_TOKEN}"})
    assert texts_of(row, prompt=IMAGE_TOKEN + "{prompt} {v}") == ["[0]|p|[1]| v< IMAGE_TOKEN>"]
    # A token that the template puts together from halves does not count either.
    row = Row(0, prompt="p", images=images(1), columns={"v": "TOKEN"})
    assert texts_of(row, prompt="<IMAGE_{v}>") == ["[0]|< IMAGE_TOKEN>"]


def test_the_system_message_has_no_image() -> None:
    with pytest.raises(OptionError, match="--system"):
        prompter(system=IMAGE_TOKEN)
    with pytest.raises(OptionError, match="--prompt: is empty"):
        prompter(prompt=" ")


# Special tokens


def test_special_tokens_of_a_row_are_escaped_and_the_operators_are_not() -> None:
    row = Row(0, prompt="a<|im_end|>", columns={"v": "</s>x", "h": "end|>"})
    assert texts_of(row) == ["a< |im_end|>"]
    template = "<|im_end|>{prompt}{v}</s><|im_{h}"
    assert texts_of(row, prompt=template) == ["<|im_end|>a< |im_end|>< /s>x</s>< |im_end|>"]
    chat = [{"role": role, "content": "<img>"} for role in ("system", "user", "assistant", "user")]
    assert [shown(message) for message in request(Row(0, messages=chat)).messages] == ["< img>"] * 4
    assert [shown(m) for m in request(row, system="<img>").messages] == ["<img>", "a< |im_end|>"]


def test_tokens_that_overlap_are_all_escaped() -> None:
    made = Prompter(PromptOptions(), SamplingOptions(), ["<ab", "b><", "><c>", "<<ab"])
    (message,) = made.request(Row(0, prompt="<<ab><c>")).messages
    assert shown(message) == "< < ab > <c>"
    assert not any(token in shown(message) for token in made.special_tokens)


def test_special_tokens_can_be_rejected() -> None:
    code, message = error_of(Row(0, prompt="a</s>"), special_tokens="fail")
    assert (code, "'</s>'" in message) == ("special_token", True)
    row = Row(0, images=images(1), columns={"v": IMAGE_TOKEN})
    assert error_of(row, special_tokens="fail", prompt="{v}")[0] == "special_token"
    assert texts_of(Row(0, prompt=IMAGE_TOKEN, images=images(1)), special_tokens="fail") == ["[0]"]
    assert texts_of(Row(0), special_tokens="fail", prompt="</s>") == ["</s>"]


pieces = st.sampled_from([*SPECIAL, IMAGE_TOKEN, "<|im_", "end|>", "<", "|", "{v}", "{prompt}", "{", "}", "text", " "])
texts = st.lists(pieces, max_size=6).map("".join)


@settings(max_examples=examples(300), deadline=None)
@given(texts, texts, texts, st.integers(0, 3))
def test_no_special_token_comes_from_a_row(literal: str, prompt: str, value: str, count: int) -> None:
    row = Row(0, prompt=prompt, images=images(count), columns={"v": value})
    for options, template in (({}, ""), ({"prompt": literal + "{v}{prompt}"}, literal)):
        try:
            made = request(row, **options)
        except PromptError:
            continue
        (message,) = made.messages
        text = "|".join(part.text for part in message.parts if part.text is not None)
        for token in SPECIAL[:-1]:
            assert text.count(token) <= template.count(token)
        assert IMAGE_TOKEN not in text
        assert [part.image for part in message.parts if part.image is not None] == list(range(count))


# Messages


def test_image_parts_place_images_in_messages() -> None:
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
        {"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": f"d{IMAGE_TOKEN}"}]},
    ]
    made = request(Row(0, messages=chat, images=images(1)), system="unused").messages
    assert [(message.role, shown(message)) for message in made] == [
        ("system", "s"),
        ("user", "a\nb"),
        ("assistant", "c"),
        ("user", "[0]|d< IMAGE_TOKEN>"),
    ]


def test_images_of_the_column_lead_the_first_user_message() -> None:
    chat: list[Any] = [{"role": "assistant", "content": "hi"}, {"role": "user", "content": "a"}]
    chat += [{"role": "assistant", "content": ""}, {"role": "user", "content": [{"type": "image", "image": 2}]}]
    made = request(Row(0, messages=chat, images=images(3)), system="s").messages
    assert [shown(message) for message in made] == ["s", "hi", "[0]|[1]|a", "", "[2]"]
    without_parts = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    made = request(Row(0, messages=without_parts, images=images(2))).messages
    assert [shown(message) for message in made] == ["[0]|[1]|a", "b", "c"]
    without_parts[2]["content"] = f"c {IMAGE_TOKEN}"
    made = request(Row(0, messages=without_parts, images=images(1))).messages
    assert [shown(message) for message in made] == ["a", "b", "c |[0]"]


@pytest.mark.parametrize(
    ("messages", "code", "expected"),
    [
        ([], "invalid_messages", "messages: end with nothing, expected the user's turn"),
        (["a"], "invalid_messages", "messages[0]: found str, expected an object"),
        ([{"role": "user"}], "invalid_messages", "found content of type NoneType"),
        (
            [{"role": "tool", "content": "a"}],
            "invalid_messages",
            "found role 'tool', expected system, user or assistant",
        ),
        ([{"content": "a"}], "invalid_messages", "found role None"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "invalid_messages",
            "end with a message of the assistant",
        ),
        ([{"role": "system", "content": "a"}], "invalid_messages", "end with a message of the system"),
        ([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "invalid_messages", "messages[1]"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "invalid_messages", "type 'audio', expected text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "invalid_messages", "type 'text'"),
        ([{"role": "user", "content": ["a"]}], "invalid_messages", "type 'str'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "invalid_messages", "type 'image'"),
        ([{"role": "user", "content": []}], "missing_prompt", "last message is empty"),
        ([{"role": "user", "content": " "}], "missing_prompt", "last message is empty"),
        (
            [{"role": "user", "content": [{"type": "image", "image": 0}]}],
            "image_count_mismatch",
            "found 1 image part in messages",
        ),
        ([{"role": "user", "content": IMAGE_TOKEN}], "image_count_mismatch", "found 1 <IMAGE_TOKEN>, expected 0"),
    ],
)
def test_messages_that_are_not_a_chat_fail(messages: Any, code: str, expected: str) -> None:
    actual_code, message = error_of(Row(0, messages=messages))
    assert actual_code == code
    assert expected in message


def test_an_image_in_an_answer_fails() -> None:
    chat = [{"role": "assistant", "content": [{"type": "image", "image": 0}]}, {"role": "user", "content": "a"}]
    assert error_of(Row(0, messages=chat, images=images(1)))[0] == "invalid_messages"
