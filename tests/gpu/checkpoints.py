"""Variants of the package's tiny model for the tests on a GPU, made in a second."""

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


def _copy(directory: Path, weights: Callable[[Weights], Weights] | None = None, **config: Any) -> Path:
    """Write a copy of the model with changed weights and configuration."""
    shutil.copytree(MODEL, directory)
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if weights is not None:
        changed = weights(load_file(MODEL / "model.safetensors"))
        contiguous = {name: tensor.contiguous() for name, tensor in changed.items()}
        save_file(contiguous, directory / "model.safetensors", {"format": "pt"})
    return directory


def _config() -> dict[str, Any]:
    config: dict[str, Any] = json.loads((MODEL / "config.json").read_text())
    return config


def unsupported_heads(directory: Path) -> Path:
    """Write a model with a vision head dimension of 32, with which TurboMind aborts the process on the first image."""
    return _copy(directory, vision_config=_config()["vision_config"] | {"num_attention_heads": 4})


def endless(directory: Path) -> Path:
    """Write a model that generates random words and never ends, for rows that take as long as they may."""

    def weights(tensors: Weights) -> Weights:
        torch.manual_seed(0)
        for name, tensor in tensors.items():
            if name.startswith("language_model") and tensor.dim() == 2:
                tensors[name] = torch.randn_like(tensor) * 0.1
        # A token's logit is the product of its embedding with the state: 0 for these, which is never the largest.
        special = json.loads((MODEL / "tokenizer.json").read_text())["added_tokens"]
        tensors["language_model.model.embed_tokens.weight"][[token["id"] for token in special]] = 0
        return tensors

    return _copy(directory, weights)


def chat_model(directory: Path) -> Path:
    """Write the same model as an InternVLChatModel, the form of InternVL-Chat-V1-5 to 3.5 with its own Python code."""

    def weights(tensors: Weights) -> Weights:
        renamed: Weights = {}
        for name, tensor in tensors.items():
            if (match := re.fullmatch(r"vision_tower\.encoder\.layer\.(\d+)\.(.+)", name)) is not None:
                layer, rest = match.groups()
                if (part := re.fullmatch(r"attention\.([qkv])_proj\.(weight|bias)", rest)) is not None:
                    if part[1] == "q":
                        qkv = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                        renamed[f"vision_model.encoder.layers.{layer}.attn.qkv.{part[2]}"] = torch.cat(qkv)
                    continue
                for old, new in CHAT_MODEL_NAMES.items():
                    rest = rest.replace(old, new)
                renamed[f"vision_model.encoder.layers.{layer}.{rest}"] = tensor
            else:
                for old, new in CHAT_MODEL_NAMES.items():
                    name = name.replace(old, new)
                renamed[name] = tensor
        renamed["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()
        return renamed

    config = _config()
    vision = config["vision_config"]
    _copy(
        directory,
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
        llm_config=config["text_config"] | {"dtype": "bfloat16", "tie_word_embeddings": False},
        force_image_size=vision["image_size"][0],
        dynamic_image_size=True,
        use_thumbnail=True,
        min_dynamic_patch=1,
        max_dynamic_patch=4,
        ps_version="v2",
        select_layer=-1,
        template="internvl2_5",
    )
    (directory / "configuration_internvl_chat.py").write_text(CHAT_CONFIGURATION.lstrip())
    for file in ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"):
        (directory / file).unlink()
    return directory


CHAT_MODEL_NAMES = {
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


def large(directory: Path) -> Path:
    """Write a model of 1.6 billion random weights: InternViT-300M with tiles of 448 pixels and Qwen2.5-1.5B."""
    from transformers import AutoConfig, InternVLForConditionalGeneration

    config = _config()
    sizes: dict[str, Any] = {
        "vision_config": config["vision_config"]
        | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        | {"image_size": [448, 448]},
        "text_config": {key: value for key, value in config["text_config"].items() if key != "layer_types"}
        | {"hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "intermediate_size": 8960}
        | {"max_position_embeddings": 32768},
        "image_seq_length": 256,
    }
    _copy(directory, **sizes)
    config_text = (directory / "config.json").read_text()
    for name, changes in (
        (
            "preprocessor_config.json",
            {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12},
        ),
        ("processor_config.json", {"image_seq_length": 256}),
    ):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            InternVLForConditionalGeneration(AutoConfig.from_pretrained(directory)).save_pretrained(directory)
    finally:
        torch.set_default_dtype(torch.float32)
    (directory / "config.json").write_text(config_text)
    return directory


def awq(directory: Path, group: int = 128) -> Path:
    """Write the model with the matrices of its language half rounded to 4 bits, in the format of AWQ's checkpoints.

    Each column of `group` numbers has a scale and a zero point; eight numbers are packed into a word, in AWQ's order.
    """
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def pack(numbers: torch.Tensor) -> torch.Tensor:
        lanes = numbers.to(torch.int64).reshape(numbers.shape[0], -1, 8)[:, :, list(order)]
        words = sum(lanes[:, :, lane] << (4 * lane) for lane in range(8))
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def weights(tensors: Weights) -> Weights:
        quantised: Weights = {}
        for name, tensor in tensors.items():
            if not re.search(r"language_model\.model\.layers\..*_proj\.weight", name):
                quantised[name] = tensor.half()
                continue
            columns = tensor.float().T.reshape(-1, group, tensor.shape[0])  # groups, numbers, outputs
            low, high = columns.amin(1).clamp(max=0), columns.amax(1).clamp(min=0)
            scales = ((high - low) / 15).clamp(min=1e-6)
            zeros = (-low / scales).round().clamp(0, 15)
            numbers = (columns / scales[:, None] + zeros[:, None]).round().clamp(0, 15)
            stem = name.removesuffix("weight")
            quantised[stem + "qweight"] = pack(numbers.reshape(-1, tensor.shape[0]))
            quantised[stem + "qzeros"], quantised[stem + "scales"] = pack(zeros), scales.half()
        return quantised

    quantization = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    text = _config()["text_config"] | {"dtype": "float16"}
    return _copy(directory, weights, quantization_config=quantization, text_config=text, dtype="float16")
