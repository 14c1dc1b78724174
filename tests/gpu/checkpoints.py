"""The tiny model that batchvl carries, in other forms: what a GPU's tests need, made in a second."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from batchvl.shapes import MODEL
from benchmarks.internvl import CHAT_CONFIGURATION

Weights = dict[str, torch.Tensor]


def _copy(folder: Path, weights: Callable[[Weights], Weights] | None = None, **config: Any) -> Path:
    shutil.copytree(MODEL, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if weights is not None:
        made = {name: tensor.contiguous() for name, tensor in weights(load_file(MODEL / "model.safetensors")).items()}
        save_file(made, folder / "model.safetensors", {"format": "pt"})
    return folder


def _config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    return found


def strange_heads(folder: Path) -> Path:
    """Vision heads of 32 numbers, for which TurboMind has no kernel: it aborts the process over the first picture."""
    return _copy(folder, vision_config=_config()["vision_config"] | {"num_attention_heads": 4})


def babbling(folder: Path) -> Path:
    """Random words without an end, for rows that take as long as they may."""

    def weights(found: Weights) -> Weights:
        torch.manual_seed(0)
        for name, tensor in found.items():
            if name.startswith("language_model") and tensor.dim() == 2:
                found[name] = torch.randn_like(tensor) * 0.1
        # A token's logit is its embedding's product with the state: 0 for these, and never the largest.
        special = json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"]
        found["language_model.model.embed_tokens.weight"][[token["id"] for token in special]] = 0
        return found

    return _copy(folder, weights)


def classic(folder: Path) -> Path:
    """The same weights as an InternVLChatModel, the form of InternVL-Chat-V1-5 to 3.5, with code of its own."""

    def weights(found: Weights) -> Weights:
        renamed: Weights = {}
        for name, tensor in found.items():
            if (match := re.fullmatch(r"vision_tower\.encoder\.layer\.(\d+)\.(.+)", name)) is not None:
                layer, rest = match.groups()
                if (part := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", rest)) is not None:
                    if part[1] == "q":
                        three = [found[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                        renamed[f"vision_model.encoder.layers.{layer}.attn.qkv.{part[2]}"] = torch.cat(three)
                    continue
                for old, new in CLASSIC_NAMES.items():
                    rest = rest.replace(old, new)
                renamed[f"vision_model.encoder.layers.{layer}.{rest}"] = tensor
            else:
                for old, new in CLASSIC_NAMES.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
        renamed["language_model.lm_head.weight"] = found["language_model.model.embed_tokens.weight"].clone()
        return renamed

    ours = _config()
    vision = ours["vision_config"]
    _copy(
        folder,
        weights,
        model_type="internvl_chat",
        architectures=["InternVLChatModel"],
        auto_map={"AutoConfig": "configuration_internvl_chat.ChatConfig"},
        vision_config={
            **{key: vision[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_channels")},
            **{key: vision[key] for key in ("intermediate_size", "layer_norm_eps", "hidden_act", "norm_type")},
            "image_size": vision["image_size"][0],
            "patch_size": vision["patch_size"][0],
            "qkv_bias": True,
            "qk_normalization": False,
            "drop_path_rate": 0.0,
            "initializer_factor": 1.0,
            "use_flash_attn": False,
            "dtype": "bfloat16",
        },
        llm_config=ours["text_config"] | {"dtype": "bfloat16", "tie_word_embeddings": False},
        force_image_size=vision["image_size"][0],
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=4,
        ps_version="v2",
        select_layer=-1,
        template="internvl2_5",
    )
    (folder / "configuration_internvl_chat.py").write_text(CHAT_CONFIGURATION.lstrip())
    for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / file).unlink()
    return folder


CLASSIC_NAMES = {
    "vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
    "vision_tower.embeddings.position_embeddings": "vision_model.embeddings.position_embedding",
    "vision_tower.embeddings.patch_embeddings.projection": "vision_model.embeddings.patch_embedding",
    "multi_modal_projector.layer_norm": "mlp1.0",
    "multi_modal_projector.linear_1": "mlp1.1",
    "multi_modal_projector.linear_2": "mlp1.3",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}


def large(folder: Path) -> Path:
    """1.6 billion random weights: InternViT-300M's, with tiles of 448 pixels, and Qwen2.5-1.5B's layers."""
    from transformers import AutoConfig, InternVLForConditionalGeneration

    ours = _config()
    sizes: dict[str, Any] = {
        "vision_config": ours["vision_config"]
        | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        | {"image_size": [448, 448]},
        "text_config": {key: value for key, value in ours["text_config"].items() if key != "layer_types"}
        | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}
        | {"max_position_embeddings": 32768},
        "image_seq_length": 256,
    }
    _copy(folder, **sizes)
    wanted = (folder / "config.json").read_text()
    for name, changes in (
        (
            "preprocessor_config.json",
            {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12},
        ),
        ("processor_config.json", {"image_seq_length": 256}),
    ):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            InternVLForConditionalGeneration(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    (folder / "config.json").write_text(wanted)
    return folder


def awq(folder: Path, group: int = 128) -> Path:
    """The language half's matrices in 4 bits, rounded to nearest, in the form that AWQ's checkpoints have.

    Each column of `group` numbers has a scale and a zero point; eight numbers lie in a word, in this order of theirs.
    """
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def packed(numbers: torch.Tensor) -> torch.Tensor:
        lanes = numbers.to(torch.int64).reshape(numbers.shape[0], -1, 8)[:, :, list(order)]
        words = sum(lanes[:, :, lane] << (4 * lane) for lane in range(8))
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def weights(found: Weights) -> Weights:
        made: Weights = {}
        for name, tensor in found.items():
            if not re.search(r"language_model\.model\.layers\..*_proj\.weight", name):
                made[name] = tensor.half()
                continue
            columns = tensor.float().T.reshape(-1, group, tensor.shape[0])  # groups, numbers, outputs
            least, most = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            scales = ((most - least) / 15).clamp(min=1e-6)
            zeros = (-least / scales).round().clamp(0, 15)
            numbers = (columns / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
            stem = name.removesuffix("weight")
            made[stem + "qweight"] = packed(numbers.reshape(-1, tensor.shape[0]))
            made[stem + "qzeros"], made[stem + "scales"] = packed(zeros), scales.half()
        return made

    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    text = _config()["text_config"] | {"dtype": "float16"}
    return _copy(folder, weights, quantization_config=quantization, text_config=text, dtype="float16")
