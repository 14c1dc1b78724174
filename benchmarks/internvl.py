"""Write an InternVL checkpoint of a real size with random weights, for measurements of speed and memory.

    python benchmarks/internvl.py 2b /tmp/internvl-2b --max-tiles 12
    python benchmarks/internvl.py 8b /tmp/internvl-8b-fp8 --fp8

The checkpoint is an InternVLForConditionalGeneration, which LMDeploy's engines and transformers load without network.
Sizes are those of InternVL3-2B and -8B: InternViT-300M and Qwen2.5-1.5B or -7B; "tiny" is for tests.

Its answers have exactly max_new_tokens tokens, with every engine and whichever end tokens are configured. See
`suppress_end_tokens`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.models.internvl.configuration_internvl import InternVLVisionConfig

VOCABULARY = 151_680
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
WORDS = VOCABULARY - len(SPECIAL) - 64
"""Number of tokens that stand for text; they come first. The last 64 tokens are unused, as in Qwen's vocabulary."""
TILE = 448
TOKENS_PER_TILE = 256
BLOCK = 128
"""Side of a quantised matrix's blocks."""


def _layers(hidden: int, count: int, heads: int, intermediate: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": hidden, "num_hidden_layers": count, "num_attention_heads": heads}
    return {**sizes, "intermediate_size": intermediate, **more}


_VISION = _layers(1024, 24, 16, 4096)
SIZES = {
    # Head dimension 64 here as well: TurboMind has kernels for it.
    "tiny": (_layers(128, 2, 2, 256), _layers(128, 2, 2, 256, num_key_value_heads=2)),
    "2b": (_VISION, _layers(1536, 28, 12, 8960, num_key_value_heads=2)),
    "8b": (_VISION, _layers(3584, 28, 28, 18944, num_key_value_heads=4)),
}
"""Layers of the vision half and of the language half."""
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CHAT_CONFIGURATION = """
from transformers import PretrainedConfig, Qwen2Config


class VisionConfig(PretrainedConfig):
    model_type = "tiny_vision"


class ChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = VisionConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))

    def to_dict(self):
        halves = {"vision_config": self.vision_config.to_dict(), "llm_config": self.llm_config.to_dict()}
        return {**super().to_dict(), **halves}
"""


def make(size: str, directory: Path, max_tiles: int = 12, fp8: bool = False) -> Path:
    """Write the checkpoint, computed on the GPU if there is one, and return its directory.

    The directory appears when it is complete.

    Args:
        size: A key of SIZES.
        directory: The checkpoint's directory.
        max_tiles: Limit of tiles per image, not counting the thumbnail; 1 turns tiling off.
        fp8: Whether to quantise the matrices of the language half to 8 bits.
    """
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = _tokenizer()
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = InternVLForConditionalGeneration(_config(size, tokenizer))
    finally:
        torch.set_default_dtype(default_dtype)
    suppress_end_tokens(model)
    model.save_pretrained(partial, max_shard_size="100GB")  # one file, which `_quantize` expects
    if fp8:
        _quantize(partial)
    square = {"height": TILE, "width": TILE}
    images = GotOcr2ImageProcessor(
        size=square,
        crop_to_patches=max_tiles > 1,
        min_patches=1,
        max_patches=max_tiles,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    video = InternVLVideoProcessor(size=square)
    processor = InternVLProcessor(
        images, tokenizer, video, image_seq_length=TOKENS_PER_TILE, chat_template=CHAT_TEMPLATE
    )
    processor.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    return partial.rename(directory)


def configure_chat(directory: Path, vision: dict[str, Any], language: dict[str, Any], **more: Any) -> None:
    """Write the configuration of an InternVLChatModel, the form of InternVL-Chat-V1-5 to 3.5 with its own Python code.

    Images are cut into at most 12 tiles of vision's image_size and a thumbnail.
    """
    (directory / "configuration_internvl_chat.py").write_text(CHAT_CONFIGURATION.lstrip())
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {
            "AutoConfig": "configuration_internvl_chat.ChatConfig",
            "AutoModel": "modeling_internvl_chat.ChatModel",
        },
        "vision_config": vision,
        "llm_config": language,
        "force_image_size": vision["image_size"],
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        "ps_version": "v2",
        "template": "internvl2_5",
        **more,
    }
    (directory / "config.json").write_text(json.dumps(config))


def suppress_end_tokens(model: Any) -> None:
    """Let the model generate only text tokens in greedy decoding, so that no engine sees the end of an answer.

    The logits of all other tokens become 0, which is less than the largest of 150,000 random logits.
    """
    with torch.no_grad():
        model.get_output_embeddings().weight[WORDS:] = 0


def _quantize(directory: Path) -> None:
    """Quantise the matrices of the language half to FP8 (E4M3) with a scale per block of 128 x 128.

    This is the format of DeepSeek-V3's checkpoints and of Qwen3's -FP8 checkpoints.
    """
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if re.search(r"^language_model\..*\.layers\..*_proj\.weight$", name)]:
        tensors[name], tensors[name + "_scale_inv"] = _quantize_blocks(tensors[name])
    save_file(tensors, file, {"format": "pt"})
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["quantization_config"] = config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))


def _quantize_blocks(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix (outputs x inputs, both divisible by BLOCK) in FP8 and the scales of its blocks."""
    rows, columns = matrix.shape
    blocks = matrix.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    quantised = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
    return quantised.reshape(rows, columns), scales


def _config(size: str, tokenizer: Any) -> InternVLConfig:
    vision, text = SIZES[size]
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **vision,
            image_size=[TILE, TILE],
            patch_size=[14, 14],
            attention_bias=True,
            use_qk_norm=False,
            norm_type="layer_norm",
            layer_scale_init_value=0.1,
            architectures=["InternVLVisionModel"],
        ),
        text_config=Qwen2Config(
            **text,
            vocab_size=VOCABULARY,
            max_position_embeddings=32768,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=["Qwen2ForCausalLM"],
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        downsample_ratio=0.5,
        image_seq_length=TOKENS_PER_TILE,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["InternVLForConditionalGeneration"],
    )


def _tokenizer() -> Any:
    """Return a tokenizer with one token per byte and placeholder words up to the size of Qwen's vocabulary."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"\u0120w{number}" for number in range(WORDS - len(words))]
    core = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--max-tiles", type=int, default=12, help="limit of tiles per image; 1 turns tiling off")
    parser.add_argument("--fp8", action="store_true", help="quantise the matrices of the language half to 8 bits")
    args = parser.parse_args()
    make(args.size, args.directory, args.max_tiles, args.fp8)
