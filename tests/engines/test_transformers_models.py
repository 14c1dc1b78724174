"""Which models the transformers engine takes, what it says of others, and what it makes of pictures."""

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
from batchvl.engines.checkpoint import find
from batchvl.engines.cuda import wait_for_memory
from batchvl.engines.transformers import TransformersEngine
from batchvl.engines.transformers.device import choose_device, choose_dtype
from batchvl.engines.transformers.families import Patches, Splits, Tiles, recognise
from batchvl.engines.transformers.preparation import ProcessorPreparation
from batchvl.errors import EngineUnavailable, ModelError, OptionError, Unsupported
from batchvl.images.decode import decode
from batchvl.ipc.arena import Arena
from tests.engines.in_process import ask, line, picture, request
from tests.tiny_models import FAMILIES


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    return {name: make(base / name) for name, make in FAMILIES.items()}


@pytest.fixture
def copy(folders, tmp_path):
    """A copy of the tiny InternVL, to be spoilt."""
    return shutil.copytree(folders["internvl"], tmp_path / "copy")


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


async def test_a_folder_that_is_not_there(tmp_path):
    assert "no such folder" in await refusal(tmp_path / "nowhere")


async def test_a_folder_without_a_checkpoint(tmp_path):
    assert "no config.json" in await refusal(tmp_path)


async def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()

    assert "no *.safetensors" in await refusal(copy)


async def test_a_name_that_the_hub_cannot_have(tmp_path):
    assert "no name of the Hugging Face hub" in await refusal("not a name!")


async def test_a_model_of_the_hub_without_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    said = await refusal("nobody/model-that-is-not-cached")

    assert "cannot be reached" in said
    assert "hf download nobody/model-that-is-not-cached" in said


async def test_internvl_s_own_repositories_are_told_apart(copy):
    change(copy / "config.json", model_type="internvl_chat", architectures=["InternVLChatModel"])

    said = await refusal(copy)

    assert "-hf" in said
    assert "lmdeploy" in said


async def test_a_model_of_an_unknown_type(copy):
    change(copy / "config.json", model_type="from_the_future")

    assert "does not know models of type 'from_the_future'" in await refusal(copy)


async def test_a_model_with_code_of_its_own_wants_trust(copy):
    change(copy / "config.json", model_type="from_the_future", auto_map={"AutoConfig": "code.Config"})

    assert "--trust-remote-code" in await refusal(copy)


async def test_a_model_that_sees_nothing(copy):
    change(copy / "config.json", model_type="qwen2", architectures=["Qwen2ForCausalLM"])

    assert "Qwen2ForCausalLM does not answer questions about pictures" in await refusal(copy)


async def test_a_model_without_a_chat_template(copy):
    (copy / "chat_template.jinja").unlink()

    assert "no chat template" in await refusal(copy)


async def test_a_model_without_its_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()

    assert "processor cannot be loaded" in await refusal(copy)


async def test_weights_that_do_not_fit_the_configuration(copy):
    (copy / "model.safetensors").write_bytes(b"rubbish")
    broken = engine(copy)
    await broken.resolve()

    with pytest.raises(ModelError, match="cannot be loaded"):
        await broken.start()


def test_an_unknown_family_is_refused_by_its_keys():
    outputs = {"input_ids": [[1]], "pixel_values": numpy.zeros((1, 3, 8, 8)), "image_sizes": numpy.array([[8, 8]])}

    with pytest.raises(ModelError, match=r"some/model.*image_sizes \(1, 2\), pixel_values \(1, 3, 8, 8\)"):
        recognise("some/model", outputs)


def test_a_folder_is_found_by_its_path(folders):
    found = find(str(folders["internvl"]))

    assert found.revision is None
    assert found.weight_bytes > 100_000


# --------------------------------------------------------------------------------------------------- options, device


def test_an_unknown_option_names_the_known_ones():
    with pytest.raises(OptionError, match=r"tread.*threads, attention"):
        engine("x", options={"tread": "2"})


def test_options_come_as_text():
    with pytest.raises(OptionError, match="threads"):
        engine("x", options={"threads": "none"})
    engine("x", options={"threads": "2", "attention": "eager"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_a_gpu_that_is_not_there(folders):
    with pytest.raises(EngineUnavailable, match="--device cpu works here"):
        await engine(folders["internvl"], device="cuda").resolve()


def test_devices_are_cpu_and_cuda():
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(OptionError, match="want auto, cpu, cuda or cuda:N"):
        choose_device("tpu")


def test_a_type_that_is_asked_for_is_taken():
    assert choose_dtype("float16", torch.device("cpu")) == "float16"
    assert choose_dtype("auto", torch.device("cpu")) in ("float32", "bfloat16")


async def test_attention_and_threads_can_be_chosen(folders):
    async with line(folders["smolvlm"], options={"attention": "eager", "threads": "1"}) as started:
        assert started.engine._thread.submit(torch.get_num_threads).result() == 1, "in the thread that computes"
        assert (await started.ask((request(0, ask("hello", 0)), [picture(28, 28)])))[0].texts


# -------------------------------------------------------------------------------------------------------- preparation


@pytest.mark.parametrize(("name", "family"), [("internvl", Tiles), ("qwen2_5_vl", Patches), ("smolvlm", Splits)])
def test_families_are_recognised(folders, name, family):
    assert isinstance(ProcessorPreparation(str(folders[name])).family, family)


@pytest.mark.parametrize(
    ("name", "limits", "shapes"),
    [
        ("internvl", (None, 1, 9), ((5, 3, 28, 28), (1, 3, 28, 28), (10, 3, 28, 28))),
        ("smolvlm", (None, 1, 3, 4), ((5, 3, 28, 28), (1, 3, 28, 28), (1, 3, 28, 28), (5, 3, 28, 28))),
        ("qwen2_5_vl", (None, 1), ((256, 96), (12100, 96))),
    ],
)
def test_max_tiles(folders, name, limits, shapes):
    question = request(0, ask("hello", 0)), [picture(600, 600)]

    found = [
        ProcessorPreparation(str(folders[name]), max_tiles=limit).prepare(*question)["pixel_values"].shape
        for limit in limits
    ]

    assert found == list(shapes)


@pytest.mark.parametrize("max_tiles", [None, 1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_become_the_same_tokens_and_tiles(folders, name, max_tiles):
    preparation = ProcessorPreparation(str(folders[name]), max_tiles=max_tiles)
    coarse, drafted = picture(6, 4), 0

    for size in [(1280, 960), (1281, 959), (600, 800), (2600, 1700), (301, 99), (60, 40), (40, 9000)]:
        file = io.BytesIO()
        coarse.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
        draft, _ = decode(file.getvalue(), ImageOptions(draft_decode=True), "it", preparation.used)
        whole, _ = decode(file.getvalue(), ImageOptions(), "it", preparation.used)
        if draft.size != size:
            drafted += 1
            assert all(have >= want for have, want in zip(draft.size, preparation.used(*size), strict=True))
            found, expected = (preparation.prepare(request(0, ask("hello", 0)), [it]) for it in (draft, whole))
            assert {key: array.shape for key, array in found.items()} == {k: a.shape for k, a in expected.items()}
            assert found["input_ids"].tolist() == expected["input_ids"].tolist()
            assert numpy.abs(found["pixel_values"] - expected["pixel_values"]).mean() < 0.05

    assert drafted >= (1 if name == "qwen2_5_vl" and max_tiles else 4)  # Qwen's limit counts tiles of 448 pixels


@pytest.mark.parametrize("name", FAMILIES)
def test_the_size_that_is_made_of_a_picture(folders, name):
    preparation = ProcessorPreparation(str(folders[name]))

    for size in [(28, 28), (1, 1), (29, 31), (84, 28), (57, 111), (112, 113), (640, 480), (333, 777), (1000, 300)]:
        columns, rows = preparation.used(*size)
        arrays = preparation.prepare(request(0, ask("hello", 0)), [picture(*size)])
        if name == "qwen2_5_vl":
            assert arrays["image_grid_thw"].tolist() == [[1, rows // 4, columns // 4]]
        else:
            tiles = -(-rows // 28) * -(-columns // 28)
            assert len(arrays["pixel_values"]) == tiles + (tiles > 1)


def test_an_unknown_processor_tells_no_size(folders, monkeypatch):
    preparation = ProcessorPreparation(str(folders["internvl"]))
    monkeypatch.setattr(type(preparation.processor.image_processor), "__module__", "theirs.got_ocr2.images")
    assert preparation.used(4000, 3000) is None


def test_a_processor_that_does_not_scale_tells_no_size(folders, monkeypatch):
    preparation = ProcessorPreparation(str(folders["internvl"]))
    monkeypatch.setattr(preparation.processor.image_processor, "do_resize", False)
    assert preparation.used(4000, 3000) is None


async def test_preparation_in_workers_is_told_by_the_engine(folders):
    spec = await engine(folders["smolvlm"], max_tiles=2, dtype="bfloat16").resolve()

    assert spec.text_too
    assert spec.options["max_tiles"] == 2
    assert spec.options["dtype"] == "bfloat16"
    assert {"<image>", "<|im_end|>", "<|endoftext|>"} <= set(spec.special_tokens)


def test_pixels_are_rounded_to_bfloat16_as_torch_does(folders):
    question = request(0, ask("hello", 0)), [picture(60, 60)]
    full, half = (
        ProcessorPreparation(str(folders["internvl"]), dtype).prepare(*question) for dtype in ("float32", "bfloat16")
    )

    expected = torch.from_numpy(full["pixel_values"]).to(torch.bfloat16)
    assert torch.equal(torch.from_numpy(half["pixel_values:bfloat16"]).view(torch.bfloat16), expected)


def test_turns_are_cut_where_answers_go(folders):
    preparation = ProcessorPreparation(str(folders["internvl"]))
    turns = request(0, ask("one", 0), ask("two"), ask("three", 1))

    arrays = preparation.prepare(turns, [picture(28, 28), picture(60, 60)])

    tokenizer = preparation.processor.tokenizer
    first, second, third = numpy.split(arrays["input_ids"], numpy.cumsum(arrays["input_ids.turns"])[:-1])
    assert tokenizer.decode(first).endswith("\none<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(second) == "<|im_end|>\n<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(third).endswith("\nthree<|im_end|>\n<|im_start|>assistant\n")
    assert arrays["pixel_values.turns"].tolist() == [1, 0, 5]


def test_a_template_that_hides_answers_is_refused_for_turns_only(copy):
    template = copy / "chat_template.jinja"
    template.write_text("{% for m in messages if m['role'] != 'assistant' %}{{ m['content'][-1]['text'] }}"
                        "{% if m['content'][0]['type'] == 'image' %}<IMG_CONTEXT>{% endif %}{% endfor %}")  # fmt: skip
    preparation = ProcessorPreparation(str(copy))

    assert preparation.prepare(request(0, ask("one", 0)), [picture(28, 28)])
    with pytest.raises(Unsupported, match="no place for the answers"):
        preparation.prepare(request(0, ask("one"), ask("two")), [])


def test_the_token_for_answers_in_a_prompt_is_noticed(folders):
    preparation = ProcessorPreparation(str(folders["internvl"]))
    token = preparation.processor.tokenizer.pad_token

    with pytest.raises(Unsupported, match="holds the special token"):
        preparation.prepare(request(0, ask(f"one {token}"), ask("two")), [])


def test_arrays_can_be_written_as_they_lie(folders):
    for name in FAMILIES:
        arrays = ProcessorPreparation(str(folders[name])).prepare(request(0, ask("x", 0)), [picture(80, 30)])
        assert all(array.flags.c_contiguous for array in arrays.values())
        assert {array.dtype.name for array in arrays.values()} <= {"int32", "int64", "float32", "bool"}


def test_memory_that_a_dead_process_held_is_waited_for(monkeypatch):
    module = "batchvl.engines.cuda"
    free = iter([(1, 100), (1, 100), (50, 100)])
    naps = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: next(free))
    monkeypatch.setattr(f"{module}.time.sleep", naps.append)
    wait_for_memory(0, 40, print)
    assert len(naps) == 2
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1, 100))
    wait_for_memory(0, 101, print)
    assert len(naps) == 2, "it would never come"
    monkeypatch.setattr(f"{module}.MEMORY_SECONDS", 0.0)
    wait_for_memory(0, 40, print)
