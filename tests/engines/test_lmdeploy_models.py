"""Which models, templates and options the lmdeploy engine takes, and what it says of others."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys

import pytest

from batchvl.engines.base import EngineInfo
from batchvl.engines.lmdeploy import LmdeployEngine
from batchvl.errors import EngineUnavailable, ModelError, OptionError, UsageError
from batchvl.ipc.arena import Arena
from batchvl.shapes import MODEL
from tests.engines import cpu_core
from tests.engines.in_process import picture
from tests.engines.lmdeploy_line import spec, with_core
from tests.tiny_models import internvl, internvl_classic, qwen2_5_vl

pytestmark = pytest.mark.lmdeploy


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("models")
    makers = {"internvl": internvl, "internvl_classic": internvl_classic, "qwen2_5_vl": qwen2_5_vl}
    return {name: make(base / name) for name, make in makers.items()}


@pytest.fixture
def copied(folders, tmp_path):
    """A copy of a model, to be spoilt."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


@pytest.fixture
def core(monkeypatch):
    cpu_core.install(monkeypatch.setattr, answer="digest")


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


async def refusal(error: type[UsageError], model=MODEL, **settings) -> str:
    """What the engine says of it before it loads any weights; for a command that is exit code 2."""

    async def resolve() -> None:
        await LmdeployEngine(spec(model, **settings), Arena(1)).resolve()

    with pytest.raises(error) as refused:
        await resolve()
    assert refused.value.exit_code == 2
    return str(refused.value)


async def info(model=MODEL, **settings) -> EngineInfo:
    async with with_core(model, **settings) as started:
        return started.line.info


# ----------------------------------------------------------------------------------------------------------- templates


async def prompt(model, **settings) -> tuple[str, EngineInfo]:
    """The prompt of a conversation with a system message."""
    async with with_core(model, **settings) as started:
        _, asked = await started.ask(["Who?", "Why?"], [picture(28, 28)], {"system": "Be brief."})
        return asked[-1].prompt, started.line.info


async def test_a_template_s_name_that_lmdeploy_dropped_is_told_and_the_model_s_own_is_used():
    plain, alone = await prompt(MODEL)
    named, told = await prompt(MODEL, flags={"chat_template": "internvl-internlm2"})

    assert named == plain
    assert told.template_sha256 == alone.template_sha256
    assert not any("--chat-template" in note for note in alone.notes)
    [note] = [note for note in told.notes if "--chat-template" in note]
    assert "internvl-internlm2" in note
    assert "the model's own template is used" in note


@pytest.mark.usefixtures("core")
async def test_a_template_that_nobody_knows_is_refused_with_names():
    said = await refusal(OptionError, flags={"chat_template": "internvl-zg"})
    assert "--chat-template internvl-zg" in said
    assert "internvl-zh" in said
    assert "deepseek-vl" in await refusal(OptionError, flags={"chat_template": "my own"})


async def test_a_model_without_a_template_wants_one_and_takes_internlm2_s_form_by_name(copied):
    model = copied("internvl")
    plain, _ = await prompt(model)
    (model / "chat_template.jinja").unlink()
    with pytest.MonkeyPatch.context() as patch:
        cpu_core.install(patch.setattr, answer="digest")
        said = await refusal(ModelError, model)

    named, told = await prompt(model, flags={"chat_template": "internvl-internlm2"})

    assert "no chat template" in said
    assert "--chat-template" in said
    assert strip(named) == strip(plain)
    assert any("InternLM2's chat format is used" in note for note in told.notes)


def strip(text: str) -> str:
    """Without the answers, which are digests of what was asked."""
    import re

    return re.sub(r"(?m)(?<=^<\|im_start\|>assistant\n)[0-9a-f ]+(?=<\|im_end\|>)", "…", text)


async def test_a_template_from_a_file(tmp_path, folders):
    file = tmp_path / "mine.json"
    pieces = {
        "system": "<<",
        "eosys": ">>",
        "user": "Q: ",
        "eoh": "\n",
        "assistant": "A: ",
        "eoa": "\n",
        "stop_words": ["\n"],
    }
    file.write_text(json.dumps(pieces))

    asked, told = await prompt(folders["internvl"], flags={"chat_template": str(file)})

    assert strip_answers(asked) == "<<Be brief.>>Q: <img><IMG_CONTEXT></img>\nWho?\nA: …\nQ: Why?\nA: "
    assert told.template_sha256 != (await info(folders["internvl"])).template_sha256
    file.write_text(json.dumps({**pieces, "user": "Question: "}))
    changed = await info(folders["internvl"], flags={"chat_template": str(file)})
    assert changed.template_sha256 != told.template_sha256
    assert (
        changed.template_sha256 == (await info(folders["internvl"], flags={"chat_template": str(file)})).template_sha256
    )


def strip_answers(text: str) -> str:
    import re

    return re.sub(r"A: [0-9a-f ]+\n", "A: …\n", text)


async def test_the_template_s_hash_is_that_of_its_text(copied):
    model = copied("internvl")
    before = await info(model)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", "<|im_end|>"))
    after = await info(model)

    assert len(before.template_sha256) == 64
    assert before.template_sha256 != after.template_sha256


@pytest.mark.usefixtures("core")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{not json", "cannot read it as JSON"),
        ('["a", "list"]', "cannot read it as JSON"),
        ('{"users": "a field that there is none of"}', "users"),
        ('{"user": 3}', "user"),
        ('{"model_name": "internvl-internlm2"}', "LMDeploy removed the template 'internvl-internlm2'"),
        ('{"model_name": "intern-vl"}', "does not know the template 'intern-vl' of model_name"),
        ('{"meta_instruction": "Be brief."}', "there is no model_name"),
    ],
)
async def test_a_template_s_file_that_is_broken_is_refused(tmp_path, text, said):
    file = tmp_path / "mine.json"
    file.write_text(text)

    refused = await refusal(OptionError, flags={"chat_template": str(file)})
    assert f"--chat-template {file}" in refused
    assert said in refused.replace(str(file), "")


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.usefixtures("core")
class TestOptions:
    async def test_an_engine_option_that_there_is_none_of_suggests_others(self):
        said = await refusal(OptionError, options={"max_batchsize": 4})
        assert "--engine-option max_batchsize" in said
        assert "did you mean max_batch_size" in said
        assert "eager_mode" in await refusal(OptionError, options={"zzz": 4})

    @pytest.mark.parametrize(
        "name", ["tp", "session_len", "cache_max_entry_count", "quant_policy", "model_format", "dtype"]
    )
    async def test_what_has_a_flag_is_given_by_it(self, name):
        said = await refusal(OptionError, options={name: 1})
        assert f"--engine-option {name}: use --{name.replace('_', '-')}" in said

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"max_batch_size": "many"}, "max_batch_size"),
            ({"eager_mode": {"a": 1}}, "eager_mode"),
            ({"max_batch_size": 0}, "max_batch_size"),
            ({"device_type": "cpu"}, "device_type"),
        ],
    )
    async def test_values_that_they_cannot_have(self, options, said):
        assert said in await refusal(OptionError, options=options)

    @pytest.mark.parametrize(
        ("flags", "said"),
        [({"quant_policy": 5}, "quant_policy"), ({"cache_max_entry_count": -0.1}, "cache_max_entry_count")],
    )
    async def test_flags_that_lmdeploy_does_not_take(self, flags, said):
        assert said in await refusal(OptionError, flags=flags)

    async def test_turbomind_that_does_not_load_names_what_is_missing(self):
        said = await refusal(EngineUnavailable, flags={"backend": "turbomind"})
        assert "libcublas.so.12" in said
        assert "--backend pytorch works without it" in said

    async def test_more_gpus_than_there_are(self):
        assert "--tp 2: found 1 GPUs" in await refusal(EngineUnavailable, flags={"tp": 2})

    async def test_float32_is_no_type_of_lmdeploys(self):
        assert "--dtype float32" in await refusal(OptionError, dtype="float32")

    async def test_devices(self, monkeypatch):
        assert "takes auto, cuda or cuda:N" in await refusal(OptionError, device="cpu")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert "--device cuda:7: CUDA_VISIBLE_DEVICES=3,5 leaves 2" in await refusal(OptionError, device="cuda:7")
        assert "--tp 2" in await refusal(OptionError, device="cuda:1", flags={"tp": 2})

    async def test_a_device_is_the_only_one_that_the_process_sees(self, monkeypatch):
        import os

        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        LmdeployEngine(spec(MODEL, device="cuda:1"), Arena(1))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"

    async def test_max_tiles_of_a_model_that_has_none(self, copied):
        model = copied("qwen2_5_vl")
        change(model, architectures=["Qwen3VLForConditionalGeneration"])
        assert "--max-tiles" in await refusal(OptionError, model, max_tiles=4)


async def test_without_a_gpu_the_engine_says_what_works():
    """Here torch finds none, and nothing stands for one."""
    said = await refusal(EngineUnavailable)
    assert "needs an NVIDIA GPU" in said
    assert "--engine transformers" in said


async def test_options_reach_the_engine():
    async with with_core(
        MODEL,
        flags={"session_len": 333, "cache_max_entry_count": 0.4},
        options={"max_batch_size": 3, "eager_mode": True},
    ) as started:
        config = started.core.engine_config
        assert (config.session_len, config.cache_max_entry_count, config.tp) == (333, 0.4, 1)
        assert (config.max_batch_size, config.eager_mode, config.enable_metrics) == (3, True, False)
        assert (config.dtype, started.line.info.dtype) == ("float16", "float16")
        assert started.line.info.context == 333


def test_turbomind_is_set_up_by_the_gpu_s_memory_unless_it_is_told():
    from transformers import Qwen2Config

    from batchvl.engines.lmdeploy.engine_config import apply_memory_defaults, engine_config

    language = Qwen2Config(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    )

    def config(free, **told):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lmdeploy.utils.get_max_batch_size", lambda _: 1024)
            found = engine_config(spec("model", flags={"backend": "turbomind"}, options=told), "turbomind")
        apply_memory_defaults(found, told, language, free)
        return found.max_batch_size, found.max_prefill_token_num, found.enable_prefix_caching

    assert config(75 * 2**30) == (512, 65_536, True)
    assert config(6 * 2**30) == (256, 8192, True)
    told = {"max_batch_size": 77, "max_prefill_token_num": 1234, "enable_prefix_caching": False}
    assert config(75 * 2**30, **told) == (77, 1234, False)


async def test_auto_is_pytorch_here_and_says_why():
    told = await info(flags={"backend": "auto"})
    asked = await info()

    assert told.backend == asked.backend == "pytorch on no GPU"
    [note] = told.notes
    assert "the backend is pytorch" in note
    assert "libcublas.so.12" in note
    assert asked.notes == ()


async def test_it_is_handed_a_quarter_or_a_list_more_than_it_computes_at_once():
    assert (await info(batch_size=1)).rows == 10  # it computes 8
    assert (await info(batch_size=4)).rows == 12
    told = await info()
    assert (told.batch_size, told.rows) == (16, 24), "no list of more than twice what it computes: they would only wait"
    assert (told.engine, told.version.startswith("0.18")) == ("lmdeploy", True)


async def test_several_gpus_of_the_pytorch_backend_are_opened_in_the_main_thread():
    """Its executor of several processes asks for signals, which only that one may."""
    for tp, main in ((2, True), (1, False)):
        async with with_core(MODEL, {"answer": "digest", "gpus": 2}, flags={"tp": tp}) as started:
            assert started.core.in_main_thread is main
            assert started.line.info.backend == "pytorch on no GPU" + " x 2" * main
            response, _ = await started.ask("hello", [picture(28, 28)])
            assert response.failure is None


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.usefixtures("core")
class TestModels:
    async def test_code_of_a_model_s_own_wants_trust(self, folders):
        said = await refusal(ModelError, folders["internvl_classic"])
        assert "--trust-remote-code" in said
        assert "-hf" in said

    async def test_a_model_whose_code_is_missing_names_the_file(self, copied):
        model = copied("internvl_classic")
        (model / "configuration_internvl_chat.py").unlink()
        said = await refusal(ModelError, model, trust_remote_code=True)
        assert "configuration_internvl_chat.py" in said
        assert "missing" in said

    async def test_code_that_does_not_run_is_the_model_s_fault(self, copied):
        """LMDeploy goes on with a configuration that fails only later, and elsewhere."""
        model = copied("internvl_classic")
        (model / "configuration_internvl_chat.py").write_text("raise RuntimeError('written for another version')\n")
        assert "written for another version" in await refusal(ModelError, model, trust_remote_code=True)

    async def test_a_model_that_sees_nothing(self, copied):
        model = copied("internvl")
        text = json.loads((model / "config.json").read_text())["text_config"]
        (model / "config.json").write_text(
            json.dumps({**text, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
        )
        said = await refusal(ModelError, model)
        assert "Qwen2ForCausalLM" in said
        assert "as a vision-language model" in said

    async def test_a_model_of_an_unknown_kind(self, copied):
        model = copied("internvl")
        change(model, model_type="from_the_future", architectures=["FutureForConditionalGeneration"])
        assert "FutureForConditionalGeneration" in await refusal(ModelError, model)

    async def test_a_configuration_that_is_no_json(self, copied):
        model = copied("internvl")
        (model / "config.json").write_text("{broken")
        assert "config.json" in await refusal(ModelError, model)

    async def test_a_configuration_without_an_architecture(self, copied):
        model = copied("internvl")
        change(model, architectures=None)
        assert "architecture" in await refusal(ModelError, model)

    async def test_a_folder_that_is_not_there(self, tmp_path):
        assert "no such directory" in await refusal(ModelError, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------------- loading


async def failed_load(behaviour, model=MODEL, **settings) -> UsageError:
    with pytest.raises(UsageError) as refused:
        async with with_core(model, behaviour, **settings):
            pass
    return refused.value


async def test_too_little_gpu_memory_is_told_with_numbers_and_advice():
    error = await failed_load({"load": "CUDA out of memory. Tried to allocate 2.50 GiB."})

    assert isinstance(error, EngineUnavailable)
    for word in (
        "16.0 of 16.0 GiB are free",
        "--cache-max-entry-count below 0.8",
        "--session-len",
        "max_batch_size=N below 8",
        "--tp 2",
    ):
        assert word in str(error)
    assert "CUDA out of memory" in str(error)


async def test_weights_that_do_not_load_are_the_model_s_fault():
    error = await failed_load({"load": "size mismatch for vision_tower.x"})

    assert isinstance(error, ModelError)
    assert "size mismatch for vision_tower.x" in str(error)


async def test_a_model_without_its_tokenizer(copied):
    model = copied("internvl")
    for file in model.glob("tokenizer*"):
        file.unlink()

    assert isinstance(await failed_load({"answer": "digest"}, model), ModelError)


async def test_a_check_of_its_surroundings_that_exits_is_told_with_what_it_logged():
    error = await failed_load({"exit": "<PyTorch> check failed! triton is too old"})

    assert isinstance(error, EngineUnavailable)
    assert "triton is too old" in str(error)


@pytest.mark.parametrize(
    "behaviour", [{"raises": "illegal instruction"}, {"status": "INTERNAL_ENGINE_ERROR"}, {"silent": True}]
)
async def test_a_core_that_fails_the_first_question_is_found_before_any_row(behaviour):
    error = await failed_load(behaviour)

    assert isinstance(error, ModelError)
    assert "the first request, about a blank image, failed" in str(error)


async def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "batchvl.engines.lmdeploy.model", None)
    assert "pip install 'batchvl[lmdeploy]'" in await refusal(EngineUnavailable)


async def test_nothing_of_a_closed_engine_goes_on(monkeypatch):
    """Also where the answer to what it asks LMDeploy each second comes at that very moment."""
    asked, answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def probe(model, stall_seconds):
        asked.set()
        return await answer

    monkeypatch.setattr("batchvl.engines.lmdeploy.engine.probe_health", probe)
    before = asyncio.all_tasks()
    async with with_core(MODEL) as started:
        await asked.wait()
        answer.set_result((1, {"status": "healthy"}))
        await started.line.engine.close()
        assert asyncio.all_tasks() == before
