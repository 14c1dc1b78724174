"""Models that the transformers engine accepts and refuses, and how it prepares images."""

from __future__ import annotations

import io
import json
import shutil

import huggingface_hub.constants
import numpy
import pytest
import torch
from PIL import Image

from batchvl.config.options import ImageOptions
from batchvl.engines.base import EngineSpec
from batchvl.engines.checkpoint import find_checkpoint
from batchvl.engines.cuda import wait_for_memory
from batchvl.engines.transformers import TransformersEngine
from batchvl.engines.transformers.device import choose_device, choose_dtype
from batchvl.engines.transformers.families import Patches, Splits, Tiles, recognise
from batchvl.engines.transformers.generation import Generation
from batchvl.engines.transformers.preparation import ProcessorPreparation
from batchvl.errors import EngineUnavailable, ModelError, OptionError, Unsupported
from batchvl.images.decode import decode
from batchvl.ipc.arena import Arena
from tests.engines.in_process import draw_image, make_request, start_transformers, user_message
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: make(base / name) for name, make in FAMILIES.items()}


@pytest.fixture
def copy(models, tmp_path):
    """A copy of the tiny InternVL that a test may damage."""
    return shutil.copytree(models["internvl"], tmp_path / "copy")


def engine(model, **spec) -> TransformersEngine:
    return TransformersEngine(EngineSpec("transformers", str(model), **{"device": "cpu", **spec}), Arena(1))


def change(file, **values):
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, **values}))


# ---------------------------------------------------------------------------------------------------------- models


async def refusal(model, **spec) -> str:
    with pytest.raises(ModelError) as refused:
        await engine(model, **spec).resolve()
    return str(refused.value)


async def test_a_missing_directory(tmp_path):
    assert "no such directory" in await refusal(tmp_path / "nowhere")


async def test_a_directory_without_a_checkpoint(tmp_path):
    assert "no config.json" in await refusal(tmp_path)


async def test_a_directory_without_weights(copy):
    (copy / "model.safetensors").unlink()

    assert "no *.safetensors" in await refusal(copy)


async def test_an_invalid_name_for_the_hub(tmp_path):
    assert "nor a valid name on the Hugging Face hub" in await refusal("not a name!")


async def test_a_model_of_the_hub_while_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    message = await refusal("nobody/model-that-is-not-cached")

    assert "cannot be reached" in message
    assert "hf download nobody/model-that-is-not-cached" in message


async def test_an_internvl_chat_model_is_refused_with_alternatives(copy):
    change(copy / "config.json", model_type="internvl_chat", architectures=["InternVLChatModel"])

    message = await refusal(copy)

    assert "-hf" in message
    assert "lmdeploy" in message


async def test_an_unknown_model_type(copy):
    change(copy / "config.json", model_type="from_the_future")

    assert "does not know models of type 'from_the_future'" in await refusal(copy)


async def test_a_model_with_its_own_code_needs_trust_remote_code(copy):
    change(copy / "config.json", model_type="from_the_future", auto_map={"AutoConfig": "code.Config"})

    assert "--trust-remote-code" in await refusal(copy)


async def test_a_model_without_vision(copy):
    change(copy / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])

    assert "Qwen2ForCausalLM is not an image-text-to-text model" in await refusal(copy)


async def test_a_model_without_a_chat_template(copy):
    (copy / "chat_template.jinja").unlink()

    assert "no chat template" in await refusal(copy)


async def test_a_model_without_its_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()

    assert "processor cannot be loaded" in await refusal(copy)


async def test_damaged_weights(copy):
    (copy / "model.safetensors").write_bytes(b"rubbish")
    broken = engine(copy)
    await broken.resolve()

    with pytest.raises(ModelError, match="cannot be loaded"):
        await broken.start()


def test_an_unknown_family_is_refused_with_its_arrays():
    outputs = {"input_ids": [[1]], "pixel_values": numpy.zeros((1, 3, 8, 8)), "image_sizes": numpy.array([[8, 8]])}

    with pytest.raises(ModelError, match=r"some/model.*image_sizes \(1, 2\), pixel_values \(1, 3, 8, 8\)"):
        recognise("some/model", outputs)


def test_a_directory_is_found_by_its_path(models):
    checkpoint = find_checkpoint(str(models["internvl"]))

    assert checkpoint.revision is None
    assert checkpoint.weight_bytes > 100_000


# --------------------------------------------------------------------------------------------------- options, device


def test_the_error_for_an_unknown_option_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"tread.*threads, attention"):
        engine("x", options={"tread": "2"})


def test_options_are_given_as_text():
    with pytest.raises(OptionError, match="threads"):
        engine("x", options={"threads": "none"})
    engine("x", options={"threads": "2", "attention": "eager"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_a_missing_gpu(models):
    with pytest.raises(EngineUnavailable, match="--device cpu works here"):
        await engine(models["internvl"], device="cuda").resolve()


def test_device_names():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(OptionError, match="want auto, cpu, cuda or cuda:N"):
        choose_device("tpu")


def test_an_explicit_dtype_is_used():
    assert choose_dtype("float16", torch.device("cpu")) == "float16"
    assert choose_dtype("auto", torch.device("cpu")) in ("float32", "bfloat16")


async def test_attention_and_threads_can_be_set(models, monkeypatch):
    answer, threads = Generation.answer, []

    def spy(*args):
        threads.append(torch.get_num_threads())  # of the engine's thread
        answer(*args)

    monkeypatch.setattr(Generation, "answer", spy)
    async with start_transformers(models["smolvlm"], options={"attention": "eager", "threads": "1"}) as started:
        assert (await started.ask((make_request(0, user_message("hello", 0)), [draw_image(28, 28)])))[0].texts

    assert set(threads) == {1}


# -------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize(("name", "family"), [("internvl", Tiles), ("qwen2_5_vl", Patches), ("smolvlm", Splits)])
def test_families_are_recognised(models, name, family):
    assert isinstance(ProcessorPreparation(str(models[name])).family, family)


@pytest.mark.parametrize(
    ("name", "limits", "shapes"),
    [
        ("internvl", (None, 1, 9), ((5, 3, 28, 28), (1, 3, 28, 28), (10, 3, 28, 28))),
        ("smolvlm", (None, 1, 3, 4), ((5, 3, 28, 28), (1, 3, 28, 28), (1, 3, 28, 28), (5, 3, 28, 28))),
        ("qwen2_5_vl", (None, 1), ((256, 96), (12100, 96))),
    ],
)
def test_max_tiles(models, name, limits, shapes):
    question = make_request(0, user_message("hello", 0)), [draw_image(600, 600)]

    found = [
        ProcessorPreparation(str(models[name]), max_tiles=limit).prepare(*question)["pixel_values"].shape
        for limit in limits
    ]

    assert found == list(shapes)


@pytest.mark.parametrize("max_tiles", [None, 1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_images_decoded_at_a_reduced_size_become_the_same_tokens_and_tiles(models, name, max_tiles):
    preparation = ProcessorPreparation(str(models[name]), max_tiles=max_tiles)
    coarse, drafted = draw_image(6, 4), 0

    for size in [(1280, 960), (1281, 959), (600, 800), (2600, 1700), (301, 99), (60, 40), (40, 9000)]:
        file = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
        draft, _ = decode(file.getvalue(), ImageOptions(draft_decode=True), "it", preparation.resized_size)
        whole, _ = decode(file.getvalue(), ImageOptions(), "it", preparation.resized_size)
        if draft.size != size:
            drafted += 1
            assert all(have >= want for have, want in zip(draft.size, preparation.resized_size(*size), strict=True))
            found, expected = (
                preparation.prepare(make_request(0, user_message("hello", 0)), [it]) for it in (draft, whole)
            )
            assert {key: array.shape for key, array in found.items()} == {k: a.shape for k, a in expected.items()}
            assert found["input_ids"].tolist() == expected["input_ids"].tolist()
            assert numpy.abs(found["pixel_values"] - expected["pixel_values"]).mean() < 0.05

    assert drafted >= (1 if name == "qwen2_5_vl" and max_tiles else 4)  # Qwen's limit counts tiles of 448 pixels


@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_that_an_image_is_scaled_to(models, name):
    preparation = ProcessorPreparation(str(models[name]))

    for size in [(28, 28), (1, 1), (29, 31), (84, 28), (57, 111), (112, 113), (640, 480), (333, 777), (1000, 300)]:
        columns, rows = preparation.resized_size(*size)
        arrays = preparation.prepare(make_request(0, user_message("hello", 0)), [draw_image(*size)])
        if name == "qwen2_5_vl":
            assert arrays["image_grid_thw"].tolist() == [[1, rows // 4, columns // 4]]
        else:
            tiles = -(-rows // 28) * -(-columns // 28)
            assert len(arrays["pixel_values"]) == tiles + (tiles > 1)


def test_the_size_is_unknown_for_an_unknown_processor(models, monkeypatch):
    preparation = ProcessorPreparation(str(models["internvl"]))
    monkeypatch.setattr(type(preparation.processor.image_processor), "__module__", "theirs.got_ocr2.images")
    assert preparation.resized_size(4000, 3000) is None


def test_the_size_is_unknown_for_a_processor_that_does_not_scale(models, monkeypatch):
    preparation = ProcessorPreparation(str(models["internvl"]))
    monkeypatch.setattr(preparation.processor.image_processor, "do_resize", False)
    assert preparation.resized_size(4000, 3000) is None


async def test_the_preparation_spec_has_the_engine_s_options(models):
    spec = await engine(models["smolvlm"], max_tiles=2, dtype="bfloat16").resolve()

    assert spec.prepares_text
    assert spec.options["max_tiles"] == 2
    assert spec.options["dtype"] == "bfloat16"
    assert {"<image>", "<|im_end|>", "<|endoftext|>"} <= set(spec.special_tokens)


def test_pixels_are_rounded_to_bfloat16_like_torch_does(models):
    question = make_request(0, user_message("hello", 0)), [draw_image(60, 60)]
    full, half = (
        ProcessorPreparation(str(models["internvl"]), dtype).prepare(*question) for dtype in ("float32", "bfloat16")
    )

    expected = torch.from_numpy(full["pixel_values"]).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(half["pixel_values:bfloat16"]).view(torch.bfloat16), expected)


def test_prompts_are_cut_at_the_answers(models):
    preparation = ProcessorPreparation(str(models["internvl"]))
    turns = make_request(0, user_message("one", 0), user_message("two"), user_message("three", 1))

    arrays = preparation.prepare(turns, [draw_image(28, 28), draw_image(60, 60)])

    tokenizer = preparation.processor.tokenizer
    first, second, third = numpy.split(arrays["input_ids"], numpy.cumsum(arrays["input_ids.turns"])[:-1])
    assert tokenizer.decode(first).endswith("\none<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(second) == "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(third).endswith("\nthree<|im_end|>\n<|im_start|>assistant\n")
    assert arrays["pixel_values.turns"].tolist() == [1, 0, 5]


def test_a_template_without_answers_is_refused_for_several_turns_only(copy):
    template = copy / "chat_template.jinja"
    template.write_text(
        "{% for m in messages if m['role'] != 'assistant' %}{{ m['content'][-1]['text'] }}"
        "{% if m['content'][0]['type'] == 'image' %}<IMG_CONTEXT>{% endif %}{% endfor %}"
    )
    preparation = ProcessorPreparation(str(copy))

    assert preparation.prepare(make_request(0, user_message("one", 0)), [draw_image(28, 28)])
    with pytest.raises(Unsupported, match="no place for the answers"):
        preparation.prepare(make_request(0, user_message("one"), user_message("two")), [])


def test_the_answer_token_in_a_prompt_is_refused(models):
    preparation = ProcessorPreparation(str(models["internvl"]))
    token = preparation.processor.tokenizer.pad_token

    with pytest.raises(Unsupported, match="holds the special token"):
        preparation.prepare(make_request(0, user_message(f"one {token}"), user_message("two")), [])


def test_arrays_are_contiguous(models):
    for name in FAMILIES:
        arrays = ProcessorPreparation(str(models[name])).prepare(
            make_request(0, user_message("x", 0)), [draw_image(80, 30)]
        )
        assert all(array.flags.c_contiguous for array in arrays.values())
        assert {array.dtype.name for array in arrays.values()} <= {"int32", "int64", "float32", "bool"}


def test_memory_held_by_a_dead_process_is_awaited(monkeypatch):
    module = "batchvl.engines.cuda"
    free = iter([(1, 100), (1, 100), (50, 100)])
    naps = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(free))
    monkeypatch.setattr(f"{module}.time.sleep", naps.append)
    wait_for_memory(0, 40)
    assert len(naps) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 100))
    wait_for_memory(0, 101)
    assert len(naps) == 2, "memory that the GPU does not have is not awaited"
    monkeypatch.setattr(f"{module}.MEMORY_SECONDS", 0.0)
    wait_for_memory(0, 40)
