"""Tiny checkpoints with random weights, one per family of models, with tokenizer, processor and chat template.

Each is written in a second, without network or torchvision, in the usual Hugging Face layout. Every printable ASCII
character is one token, so that answers survive decoding and encoding, and every stop string spans several tokens.
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

CHARACTERS = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # blank and newline in byte-level BPE
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 512

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(special_tokens: list[str], attributes: dict[str, str]) -> Any:
    """Return a tokenizer of single characters.

    Args:
        special_tokens: Special tokens besides SPECIAL.
        attributes: Names of the tokenizer's attributes for some of them.
    """
    tokenizer = Qwen2Tokenizer(
        vocab={character: number for number, character in enumerate(CHARACTERS)},
        merges=[],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=CONTEXT,
        padding_side="left",
        extra_special_tokens=attributes,
    )
    tokenizer.add_tokens([*SPECIAL, *special_tokens], special_tokens=True)
    return tokenizer


def _text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
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
        "initializer_range": 0.3,  # large, so that logits are well separated and every image matters
        **more,
    }


def _save(
    model: PreTrainedModel,
    tokenizer: Any,
    directory: Path,
    image_text: str,
    images: dict[str, Any],
    processor: dict[str, Any],
) -> Path:
    """Write a checkpoint.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        directory: The checkpoint's directory.
        image_text: What the chat template writes for an image.
        images: preprocessor_config.json.
        processor: processor_config.json.
    """
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Like that of many published models: an answer must not be affected unless the run asks for it.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", image_text))
    (directory / "preprocessor_config.json").write_text(json.dumps(images))
    (directory / "processor_config.json").write_text(json.dumps(processor))
    return directory


def internvl(directory: Path, seed: int = 0) -> Path:
    """Write an InternVLForConditionalGeneration: at most 4 tiles of 28 x 28 pixels and a thumbnail, 4 tokens each."""
    torch.manual_seed(seed)
    attributes = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = make_tokenizer(list(attributes.values()), attributes)
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
        text_config=_text_config(tokenizer, model_type="qwen2"),
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
    return _save(model, tokenizer, directory, "<IMG_CONTEXT>\\n", images, processor)


def qwen2_5_vl(directory: Path, seed: int = 0) -> Path:
    """Write a Qwen2_5_VLForConditionalGeneration: patches of 4 x 4 pixels, 2 x 2 per token, any image size."""
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
        text_config=_text_config(
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
    image_text = "<|vision_start|><|image_pad|><|vision_end|>"
    return _save(Qwen2_5_VLForConditionalGeneration(config), tokenizer, directory, image_text, images, processor)


def smolvlm(directory: Path, seed: int = 0) -> Path:
    """Write a SmolVLMForConditionalGeneration: at most 2 x 2 splits of 28 x 28 pixels and the whole, 4 tokens each."""
    torch.manual_seed(seed)
    attributes = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    cells = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    tokenizer = make_tokenizer([*attributes.values(), *cells], attributes)
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
        text_config=_text_config(tokenizer, model_type="llama"),
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
    return _save(SmolVLMForConditionalGeneration(config), tokenizer, directory, "<image>", images, processor)


def internvl_chat(directory: Path) -> Path:
    """Write an InternVLChatModel, the form with its own Python code, without weights, for tests of preparation.

    It has at most 12 tiles of 28 x 28 pixels and a thumbnail, 4 tokens each.
    """
    image_tokens = ["<img>", "</img>", "<IMG_CONTEXT>"]
    tokenizer = make_tokenizer(image_tokens, {})
    tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    vision = {"hidden_size": 128, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
    configure_chat(directory, vision, _text_config(tokenizer, architectures=["Qwen2ForCausalLM"]), dtype="float16")
    save_file({"empty": torch.zeros(1)}, directory / "model.safetensors", {"format": "pt"})
    return directory


FAMILIES = {"internvl": internvl, "qwen2_5_vl": qwen2_5_vl, "smolvlm": smolvlm}
