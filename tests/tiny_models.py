"""Tiny checkpoints with random weights, one a family of models, complete with tokenizer, processor and chat template.

Made in a second each, without network and without torchvision; each is a normal Hugging Face folder. Every printable
ASCII character is one token, so whatever a model says survives decoding and encoding again, and every stop string
stands across token borders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from benchmarks.internvl import configure_chat

CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level BPE's spelling of blank and newline
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 512

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(more: list[str], named: dict[str, str]) -> Any:
    """A tokenizer of single characters; `more` are special tokens, `named` its attributes that hold some of them."""
    tokenizer = Qwen2Tokenizer(
        vocab={character: number for number, character in enumerate(CHARACTERS)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT,
        padding_side="left",
        extra_special_tokens=named,
    )
    tokenizer.add_tokens([*SPECIAL, *more], special_tokens=True)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,  # wide, so that no two logits are nearly alike and every picture matters
        **more,
    }


def _save(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: Path,
    picture: str,
    images: dict[str, Any],
    processor: dict[str, Any],
) -> Path:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # As many published models have it: none of this may reach an answer that did not ask for it.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", picture))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder


def internvl(folder: Path, seed: int = 0) -> Path:
    """An InternVLForConditionalGeneration: tiles of 28 x 28 pixels, 4 tokens each, at most 4 and a thumbnail."""
    torch.manual_seed(seed)
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(list(named.values()), named)
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "norm_type": "layer_norm",
            "initializer_range": 0.3,
            "layer_scale_init_value": 0.5,
        },
        text_config=_text(tokenizer, model_type="qwen2"),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
    )
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "size": {"height": 28, "width": 28},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 4,
    }
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": 4}
    model = InternVLForConditionalGeneration(config)
    return _save(model, tokenizer, folder, "<IMG_CONTEXT>\\n", images, processor)


def qwen2_5_vl(folder: Path, seed: int = 0) -> Path:
    """A Qwen2_5_VLForConditionalGeneration: patches of 4 x 4 pixels, 2 x 2 of them a token, any picture size."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], {})
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.3,
        },
        text_config=_text(
            tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
    )
    images = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": 4,
        "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64},
    }
    processor = {"processor_class": "Qwen2_5_VLProcessor"}
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    return _save(Qwen2_5_VLForConditionalGeneration(config), tokenizer, folder, picture, images, processor)


def smolvlm(folder: Path, seed: int = 0) -> Path:
    """A SmolVLMForConditionalGeneration: splits of 28 x 28 pixels, 4 tokens each, at most 2 x 2 and the whole."""
    torch.manual_seed(seed)
    named = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = make_tokenizer([*named.values(), *cells], named)
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "image_size": 28,
            "patch_size": 7,
            "initializer_range": 0.3,
        },
        text_config=_text(tokenizer, model_type="llama"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = {
        "image_processor_type": "SmolVLMImageProcessor",
        "size": {"longest_edge": 56},
        "max_image_size": {"longest_edge": 28},
    }
    processor = {"processor_class": "SmolVLMProcessor", "image_seq_len": 4}
    return _save(SmolVLMForConditionalGeneration(config), tokenizer, folder, "<image>", images, processor)


def internvl_classic(folder: Path) -> Path:
    """An InternVLChatModel, the form that brings Python code of its own: tiles of 28 x 28 pixels, 4 tokens each, at
    most 12 and a thumbnail. Its weights are empty: for preparation alone.
    """
    marks = ["<img>", "</img>", "<IMG_CONTEXT>"]
    tokenizer = make_tokenizer(marks, {})
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    vision = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    configure_chat(folder, vision, _text(tokenizer, architectures=["Qwen2ForCausalLM"]), dtype="float16")
    save_file({"empty": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    return folder


FAMILIES = {"internvl": internvl, "qwen2_5_vl": qwen2_5_vl, "smolvlm": smolvlm}
