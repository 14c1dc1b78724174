"""Which models, templates and options the lmdeploy engine accepts, and how it refuses others."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import sys

import pytest

from batchvl.engines.base import EngineInfo
from batchvl.engines.lmdeploy import LmdeployEngine
from batchvl.errors import EngineUnavailable, ModelError, OptionError, UsageError
from batchvl.ipc.arena import Arena
from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import draw_image
from tests.engines.lmdeploy_harness import lmdeploy_spec, start_lmdeploy
from tests.tiny_models import internvl, internvl_chat, qwen2_5_vl

pytestmark = pytest.mark.lmdeploy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    makers = {"internvl": internvl, "internvl_chat": internvl_chat, "qwen2_5_vl": qwen2_5_vl}
    return {name: make(base / name) for name, make in makers.items()}


@pytest.fixture
def copy_model(models, tmp_path):
    """Return a function that copies a model, so that a test can change it."""
    return lambda name: shutil.copytree(models[name], tmp_path / name)


@pytest.fixture
def core(monkeypatch):
    cpu_core.install(monkeypatch.setattr, answer="digest")


def change_config(model, **values):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


async def refusal(error: type[UsageError], model=MODEL, **settings) -> str:
    """Return the engine's message when it refuses a spec before it loads weights. The command exits with code 2."""

    async def resolve() -> None:
        await LmdeployEngine(lmdeploy_spec(model, **settings), Arena(1)).resolve()

    with pytest.raises(error) as refused:
        await resolve()
    assert refused.value.exit_code == 2
    return str(refused.value)


async def start_info(model=MODEL, **settings) -> EngineInfo:
    async with start_lmdeploy(model, **settings) as lmdeploy:
        return lmdeploy.harness.info


# ----------------------------------------------------------------------------------------------------------- templates


async def render_prompt(model, **settings) -> tuple[str, EngineInfo]:
    """Return the prompt of a conversation with a system message."""
    async with start_lmdeploy(model, **settings) as lmdeploy:
        _, requests = await lmdeploy.ask(["Who?", "Why?"], [draw_image(28, 28)], {"system": "Be brief."})
        return requests[-1].prompt, lmdeploy.harness.info


async def test_for_a_template_that_lmdeploy_removed_the_model_s_own_is_used_with_a_note():
    prompt, info = await render_prompt(MODEL)
    named_prompt, named_info = await render_prompt(MODEL, flags={"chat_template": "internvl-internlm2"})

    assert named_prompt == prompt
    assert named_info.template_sha256 == info.template_sha256
    assert not any("--chat-template" in note for note in info.notes)
    [note] = [note for note in named_info.notes if "--chat-template" in note]
    assert "internvl-internlm2" in note
    assert "the model's own template is used" in note


@pytest.mark.usefixtures("core")
async def test_an_unknown_template_is_refused_with_suggestions():
    message = await refusal(OptionError, flags={"chat_template": "internvl-zg"})
    assert "--chat-template internvl-zg" in message
    assert "internvl-zh" in message
    assert "deepseek-vl" in await refusal(OptionError, flags={"chat_template": "my own"})


async def test_a_model_without_a_template_needs_one_and_takes_internlm2_s_by_name(copy_model):
    model = copy_model("internvl")
    own_prompt, _ = await render_prompt(model)
    (model / "chat_template.jinja").unlink()
    with pytest.MonkeyPatch.context() as patch:
        cpu_core.install(patch.setattr, answer="digest")
        message = await refusal(ModelError, model)

    prompt, info = await render_prompt(model, flags={"chat_template": "internvl-internlm2"})

    assert "no usable chat template" in message
    assert "--chat-template" in message
    assert without_answers(prompt) == without_answers(own_prompt)
    assert any("InternLM2's chat format is used" in note for note in info.notes)


def without_answers(text: str) -> str:
    """Remove the answers, which are digests of the prompts."""
    return re.sub(r"(?m)(?<=^<\|im_start\|>assistant\n)[0-9a-f ]+(?=<\|im_end\|>)", "…", text)


async def test_a_template_from_a_file(tmp_path, models):
    file = tmp_path / "template.json"
    fields = {
        "system": "<<",
        "eosys": ">>",
        "user": "Q: ",
        "eoh": "\n",
        "assistant": "A: ",
        "eoa": "\n",
        "stop_words": ["\n"],
    }
    file.write_text(json.dumps(fields))
    flags = {"chat_template": str(file)}

    prompt, info = await render_prompt(models["internvl"], flags=flags)

    expected = "<<Be brief.>>Q: <img><IMG_CONTEXT></img>\nWho?\nA: …\nQ: Why?\nA: "
    assert re.sub(r"A: [0-9a-f ]+\n", "A: …\n", prompt) == expected
    assert info.template_sha256 != (await start_info(models["internvl"])).template_sha256
    file.write_text(json.dumps({**fields, "user": "Question: "}))
    changed = await start_info(models["internvl"], flags=flags)
    assert changed.template_sha256 != info.template_sha256
    assert changed.template_sha256 == (await start_info(models["internvl"], flags=flags)).template_sha256


async def test_the_template_s_digest_is_that_of_its_text(copy_model):
    model = copy_model("internvl")
    before = await start_info(model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    after = await start_info(model)

    assert len(before.template_sha256) == 64
    assert before.template_sha256 != after.template_sha256


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "cannot read it as JSON"),
        ('["a", "list"]', "cannot read it as JSON"),
        ('{"users": "an unknown field"}', "unknown field 'users'"),
        ('{"user": 3}', "user must be a string"),
        ('{"model_name": "internvl-internlm2"}', "LMDeploy removed the template 'internvl-internlm2'"),
        ('{"model_name": "intern-vl"}', "LMDeploy does not know the template 'intern-vl' of model_name"),
        ('{"meta_instruction": "Be brief."}', "there is no model_name"),
    ],
)
async def test_an_invalid_template_file_is_refused(tmp_path, text, message):
    file = tmp_path / "template.json"
    file.write_text(text)

    refused = await refusal(OptionError, flags={"chat_template": str(file)})
    assert f"--chat-template {file}" in refused
    assert message in refused.replace(str(file), "")


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.usefixtures("core")
class TestOptions:
    async def test_an_unknown_engine_option_is_refused_with_suggestions(self):
        message = await refusal(OptionError, options={"max_batchsize": 4})
        assert "--engine-option max_batchsize" in message
        assert "did you mean max_batch_size" in message
        assert "eager_mode" in await refusal(OptionError, options={"zzz": 4})

    @pytest.mark.parametrize(
        "name", ["tp", "session_len", "cache_max_entry_count", "quant_policy", "model_format", "dtype"]
    )
    async def test_an_option_that_has_a_flag_is_refused(self, name):
        message = await refusal(OptionError, options={name: 1})
        assert f"--engine-option {name}: use --{name.replace('_', '-')} instead" in message

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"max_batch_size": "many"}, "max_batch_size"),
            ({"eager_mode": {"a": 1}}, "eager_mode"),
            ({"max_batch_size": 0}, "max_batch_size"),
            ({"device_type": "cpu"}, "device_type"),
        ],
    )
    async def test_invalid_values_of_options(self, options, name):
        assert name in await refusal(OptionError, options=options)

    @pytest.mark.parametrize(
        ("flags", "name"),
        [({"quant_policy": 5}, "quant_policy"), ({"cache_max_entry_count": -0.1}, "cache_max_entry_count")],
    )
    async def test_values_of_flags_that_lmdeploy_does_not_accept(self, flags, name):
        assert name in await refusal(OptionError, flags=flags)

    async def test_the_libraries_that_turbomind_lacks_are_named(self):
        message = await refusal(EngineUnavailable, flags={"backend": "turbomind"})
        assert "libcublas.so.12" in message
        assert "--backend pytorch works without it" in message

    async def test_more_gpus_than_there_are(self):
        assert "--tp 2: found 1 GPUs" in await refusal(EngineUnavailable, flags={"tp": 2})

    async def test_lmdeploy_has_no_float32(self):
        assert "--dtype float32" in await refusal(OptionError, dtype="float32")

    async def test_invalid_devices(self, monkeypatch):
        assert "takes auto, cuda or cuda:N" in await refusal(OptionError, device="cpu")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert "--device cuda:7: CUDA_VISIBLE_DEVICES=3,5 leaves 2" in await refusal(OptionError, device="cuda:7")
        assert "--tp 2" in await refusal(OptionError, device="cuda:1", flags={"tp": 2})

    async def test_the_process_sees_only_the_device_that_was_named(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        LmdeployEngine(lmdeploy_spec(MODEL, device="cuda:1"), Arena(1))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"

    async def test_max_tiles_of_a_model_that_has_no_such_setting(self, copy_model):
        model = copy_model("qwen2_5_vl")
        change_config(model, architectures=["Qwen3VLForConditionalGeneration"])
        assert "--max-tiles" in await refusal(OptionError, model, max_tiles=4)


async def test_without_a_gpu_the_engine_names_one_that_works():
    """Here torch finds no GPU, and the test does not pretend that there is one."""
    message = await refusal(EngineUnavailable)
    assert "needs an NVIDIA GPU" in message
    assert "--engine transformers" in message


async def test_options_reach_the_engine():
    async with start_lmdeploy(
        MODEL,
        flags={"session_len": 333, "cache_max_entry_count": 0.4},
        options={"max_batch_size": 3, "eager_mode": True},
    ) as lmdeploy:
        config = lmdeploy.core.engine_config
        assert (config.session_len, config.cache_max_entry_count, config.tp) == (333, 0.4, 1)
        assert (config.max_batch_size, config.eager_mode, config.enable_metrics) == (3, True, False)
        assert (config.dtype, lmdeploy.harness.info.dtype) == ("float16", "float16")
        assert lmdeploy.harness.info.context == 333


def test_turbomind_is_configured_for_the_gpu_s_memory_where_the_user_set_nothing():
    from transformers import Qwen2Config

    from batchvl.engines.lmdeploy.engine_config import apply_memory_defaults, engine_config

    language = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    )

    def configure(free, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lmdeploy.utils.get_max_batch_size", lambda _: 1024)
            spec = lmdeploy_spec("model", flags={"backend": "turbomind"}, options=options)
            config = engine_config(spec, "turbomind")
        apply_memory_defaults(config, options, language, free)
        return config.max_batch_size, config.max_prefill_token_num, config.enable_prefix_caching

    assert configure(75 * 2**30) == (512, 65_536, True)
    assert configure(6 * 2**30) == (256, 8192, True)
    options = {"max_batch_size": 77, "max_prefill_token_num": 1234, "enable_prefix_caching": False}
    assert configure(75 * 2**30, **options) == (77, 1234, False)


async def test_auto_is_pytorch_here_with_a_note_that_says_why():
    automatic = await start_info(flags={"backend": "auto"})
    pytorch = await start_info()

    assert automatic.backend == pytorch.backend == "pytorch on no GPU"
    [note] = automatic.notes
    assert "the backend is pytorch" in note
    assert "libcublas.so.12" in note
    assert pytorch.notes == ()


async def test_it_holds_a_quarter_or_a_batch_more_rows_than_it_computes():
    assert (await start_info(batch_size=1)).rows == 10  # it computes 8
    assert (await start_info(batch_size=4)).rows == 12
    info = await start_info()
    assert (info.batch_size, info.rows) == (16, 24), "no batch of more than twice what it computes: rows would wait"
    assert (info.engine, info.version.startswith("0.18")) == ("lmdeploy", True)


async def test_the_pytorch_backend_starts_several_gpus_in_the_main_thread():
    """Its executor of several processes sets signal handlers, which works only there."""
    for tp, in_main_thread in ((2, True), (1, False)):
        async with start_lmdeploy(MODEL, {"answer": "digest", "gpus": 2}, flags={"tp": tp}) as lmdeploy:
            assert lmdeploy.core.in_main_thread is in_main_thread
            assert lmdeploy.harness.info.backend == "pytorch on no GPU" + " x 2" * in_main_thread
            response, _ = await lmdeploy.ask("hello", [draw_image(28, 28)])
            assert response.failure is None


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.usefixtures("core")
class TestModels:
    async def test_a_model_s_own_code_must_be_trusted(self, models):
        message = await refusal(ModelError, models["internvl_chat"])
        assert "--trust-remote-code" in message
        assert "-hf" in message

    async def test_missing_code_is_named(self, copy_model):
        model = copy_model("internvl_chat")
        (model / "configuration_internvl_chat.py").unlink()
        message = await refusal(ModelError, model, trust_remote_code=True)
        assert "configuration_internvl_chat.py" in message
        assert "missing" in message

    async def test_code_that_does_not_run_is_an_error_of_the_model(self, copy_model):
        """LMDeploy continues with a configuration that fails only later, in another place."""
        model = copy_model("internvl_chat")
        (model / "configuration_internvl_chat.py").write_text("raise RuntimeError('written for another version')\n")
        assert "written for another version" in await refusal(ModelError, model, trust_remote_code=True)

    async def test_a_text_only_model_is_refused(self, copy_model):
        model = copy_model("internvl")
        text = json.loads((model / "config.json").read_text())["text_config"]
        config = {**text, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
        (model / "config.json").write_text(json.dumps(config))
        message = await refusal(ModelError, model)
        assert "Qwen2ForCausalLM" in message
        assert "as a vision-language model" in message

    async def test_an_unknown_architecture_is_refused(self, copy_model):
        model = copy_model("internvl")
        change_config(model, model_type="from_the_future", architectures=["FutureForConditionalGeneration"])
        assert "FutureForConditionalGeneration" in await refusal(ModelError, model)

    async def test_a_configuration_that_is_not_json(self, copy_model):
        model = copy_model("internvl")
        (model / "config.json").write_text("{broken")
        assert "config.json" in await refusal(ModelError, model)

    async def test_a_configuration_without_an_architecture(self, copy_model):
        model = copy_model("internvl")
        change_config(model, architectures=None)
        assert "architecture" in await refusal(ModelError, model)

    async def test_a_directory_that_does_not_exist(self, tmp_path):
        assert "no such directory" in await refusal(ModelError, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------- loading


async def load_error(behaviour, model=MODEL, **settings) -> UsageError:
    with pytest.raises(UsageError) as refused:
        async with start_lmdeploy(model, behaviour, **settings):
            pass
    return refused.value


async def test_too_little_gpu_memory_is_reported_with_numbers_and_advice():
    error = await load_error({"load": "CUDA out of memory. Tried to allocate 2.50 GiB."})

    assert isinstance(error, EngineUnavailable)
    for words in (
        "16.0 of 16.0 GiB are free",
        "--cache-max-entry-count below 0.8",
        "--session-len",
        "max_batch_size=N below 8",
        "--tp 2",
        "CUDA out of memory",
    ):
        assert words in str(error)


async def test_weights_that_do_not_load_are_an_error_of_the_model():
    error = await load_error({"load": "size mismatch for vision_tower.x"})

    assert isinstance(error, ModelError)
    assert "size mismatch for vision_tower.x" in str(error)


async def test_a_model_without_its_tokenizer(copy_model):
    model = copy_model("internvl")
    for file in model.glob("tokenizer*"):
        file.unlink()

    assert isinstance(await load_error({"answer": "digest"}, model), ModelError)


async def test_a_check_of_lmdeploy_that_exits_is_reported_with_what_it_logged():
    error = await load_error({"exit": "<PyTorch> check failed! triton is too old"})

    assert isinstance(error, EngineUnavailable)
    assert "triton is too old" in str(error)


@pytest.mark.parametrize(
    "behaviour", [{"raises": "illegal instruction"}, {"status": "INTERNAL_ENGINE_ERROR"}, {"silent": True}]
)
async def test_a_core_that_fails_the_first_request_is_noticed_before_any_row(behaviour):
    error = await load_error(behaviour)

    assert isinstance(error, ModelError)
    assert "the first request, about a blank image, failed" in str(error)


async def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "batchvl.engines.lmdeploy.model", None)
    assert "pip install 'batchvl[lmdeploy]'" in await refusal(EngineUnavailable)


async def test_a_closed_engine_leaves_no_task_behind(monkeypatch):
    """Not even if the result of its health probe arrives at that very moment."""
    probed, result = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def probe_health(model, stall_seconds):
        probed.set()
        return await result

    monkeypatch.setattr("batchvl.engines.lmdeploy.engine.probe_health", probe_health)
    before = asyncio.all_tasks()
    async with start_lmdeploy(MODEL) as lmdeploy:
        await probed.wait()
        result.set_result((1, {"status": "healthy"}))
        await lmdeploy.harness.engine.close()
        assert asyncio.all_tasks() == before
