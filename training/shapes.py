#!/usr/bin/env python3
"""Build, train and check the shapes model: a tiny InternVL that answers questions about drawn shapes.

    python training/shapes.py random OUT                   # random weights
    python training/shapes.py train OUT --minutes 6.2      # trained weights
    python training/shapes.py eval OUT --n 400             # share of right answers on new scenes

OUT is a Hugging Face checkpoint with weights in bfloat16. Nothing is downloaded from a hub.
"""

import argparse
import copy
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    Qwen2Tokenizer,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils import is_torchvision_available

from batchvl.shapes.scenes import DESCRIBE, KINDS, SHAPES, ask_about, ask_about_pair, draw_scene, make_scene

TILE, PATCH, SHRINK = 112, 14, 0.5  # sides of tiles and patches in pixels; 2 x 2 patches become one image token
TOKENS_PER_TILE = int((TILE // PATCH * SHRINK) ** 2)
MAX_TILES = 4
VOCABULARY = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>"]
NAMED_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] in ['image', 'image_url'] %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
SIZES = {"one": (TILE, TILE), "wide": (2 * TILE, TILE), "tall": (TILE, 2 * TILE), "grid": (2 * TILE, 2 * TILE)}
"""Image size in pixels by arrangement of tiles."""

WARMUP = 200  # steps up to the highest learning rate
HOLD = 0.3  # share of the training at the highest rate, before the cosine decay
SIMPLE = 0.35  # share of the training with images of one tile only
LAYOUTS = (*SIZES, "pair", "shapes")
SHARES = ((60, 0, 0, 0, 10, 30), (35, 8, 8, 10, 20, 19), (20, 15, 25, 15, 10, 15))
"""Weights of the layouts in the three phases of training: up to SIMPLE, after it, and with --resume."""
REPORT_EVERY = 50  # steps


# ---------------------------------------------------------------------------------- tokenizer, processor, model


def build_tokenizer() -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer in Qwen2's form that encodes any text, with one token per word of the task."""
    rng, lines = random.Random(0), list(DESCRIBE)
    for _ in range(4000):
        scenes = make_scene(rng), make_scene(rng)
        for kind in KINDS:
            lines += ask_about(scenes[0], kind, rng) or ()
        lines += ask_about_pair(*scenes, rng)
    lines += ["system\nYou are a helpful assistant.", "user\nImage-1: \nImage-2: \nImage-3: ", "assistant\n"] * 50
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=4096,
        padding_side="left",
        extra_special_tokens=NAMED_TOKENS,
    )
    tokenizer.add_tokens(SPECIAL_TOKENS, special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_image_processor() -> GotOcr2ImageProcessorPil:
    return GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE},
        crop_to_patches=True,
        min_patches=1,
        max_patches=MAX_TILES,
        image_mean=MEAN,
        image_std=STD,
    )


class ImageTextProcessor(InternVLProcessor):
    """InternVLProcessor without its video processor, which needs torchvision (PyPI has no CPU build of it)."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor" and argument is None:
            return type(None)
        return super().check_argument_for_proper_class(name, argument)


def load_processor(directory: Path) -> InternVLProcessor:
    """Return AutoProcessor's result if torchvision is installed, else the same without its video processor."""
    if is_torchvision_available():
        return AutoProcessor.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    images = GotOcr2ImageProcessorPil.from_pretrained(directory)
    length = json.loads((directory / "processor_config.json").read_text())["image_seq_length"]
    return ImageTextProcessor(images, tokenizer, None, image_seq_length=length, chat_template=tokenizer.chat_template)


def build_model(tokenizer: Qwen2Tokenizer) -> InternVLForConditionalGeneration:
    """Return a model of 3 M parameters.

    Both towers have a head dimension of 64, the smallest for which LMDeploy's TurboMind has kernels.
    """
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = InternVLConfig(
        vision_config={
            "architectures": ["InternVLVisionModel"],
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "attention_bias": True,
            "image_size": [TILE, TILE],
            "patch_size": [PATCH, PATCH],
            "norm_type": "layer_norm",
            "use_qk_norm": False,
            "use_mean_pooling": True,
            "layer_scale_init_value": 0.5,
        },
        text_config={
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        image_token_id=ids["<IMG_CONTEXT>"],
        image_seq_length=TOKENS_PER_TILE,
        downsample_ratio=SHRINK,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    model = InternVLForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embeddings, std=0.02)
    torch.nn.init.normal_(model.model.vision_tower.embeddings.cls_token, std=0.02)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.generation_config.max_new_tokens = 48
    model.generation_config.do_sample = False
    return model


def save(model: InternVLForConditionalGeneration, tokenizer: Qwen2Tokenizer, directory: Path) -> None:
    """Write a checkpoint that transformers 4 and 5, vLLM and LMDeploy read; LMDeploy needs both towers' architectures.

    The processor's files are written by hand because transformers would write the names of the classes used here.
    """
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = {
        name: settings.pop(name) for name in NAMED_TOKENS
    }  # as transformers 4 and 5 read it
    settings.pop("backend", None)
    images = {key: value for key, value in build_image_processor().to_dict().items() if value is not None}
    names = {"processor_class": "InternVLProcessor"}
    files = {
        "tokenizer_config.json": settings,
        "preprocessor_config.json": images | names | {"image_processor_type": "GotOcr2ImageProcessor"},
        "processor_config.json": names | {"image_seq_length": TOKENS_PER_TILE},
        "video_preprocessor_config.json": names
        | {
            "video_processor_type": "InternVLVideoProcessor",
            "size": images["size"],
            "image_mean": MEAN,
            "image_std": STD,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "do_convert_rgb": True,
            "resample": 3,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------- training data


class ConversationBatches(IterableDataset):
    """Endless batches of conversations. All images of a batch have one layout, so that its tensors have one size.

    The layout "shapes" has images of several things and asks only which shape has a colour. This question is learned
    last because in other conversations an earlier caption often contains its answer.
    """

    def __init__(self, tokenizer: Qwen2Tokenizer, batch: int, seed: int, turns: int = 3) -> None:
        self.tokenizer, self.batch, self.seed, self.turns = tokenizer, batch, seed, turns
        self.phase = torch.multiprocessing.Value("i", 0)  # index into SHARES, read by the workers
        self.image_processor = build_image_processor()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rng = _worker_rng(str(self.seed))
        while True:
            yield self._batch(rng.choices(LAYOUTS, SHARES[self.phase.value])[0], rng)

    def _batch(self, layout: str, rng: random.Random) -> dict[str, Any]:
        one_tile = layout in ("one", "pair", "shapes")
        images, rows = [], []
        for _ in range(self.batch if one_tile else self.batch // 2):
            scenes = [make_scene(rng) for _ in range(2 if layout == "pair" else 1)]
            while layout == "shapes" and (len(scenes[0].things) == 1 or not ask_about(scenes[0], "shape", rng)):
                scenes = [make_scene(rng)]
            width, height = SIZES["one" if one_tile else layout]
            if one_tile and rng.random() < 0.5:
                width, height = (int(side * rng.uniform(1.0, 1.9)) for side in (width, height))
            images += [draw_scene(scene, width, height, rng) for scene in scenes]
            if layout == "pair":
                questions = [ask_about_pair(*scenes, rng) for _ in range(self.turns)]
            else:
                kinds = ["shape"] * self.turns if layout == "shapes" else rng.sample(KINDS, self.turns)
                questions = [question for kind in kinds if (question := ask_about(scenes[0], kind, rng))]
            rows.append((len(scenes), questions))
        pixels = self.image_processor(
            images,
            min_patches=1,
            max_patches=1 if one_tile else MAX_TILES,
            crop_to_patches=not one_tile,
            return_tensors="pt",
        )["pixel_values"]
        tiles = len(pixels) // len(images)
        texts = [self._encode(count, tiles, questions, rng) for count, questions in rows]
        longest, pad = max(len(ids) for ids, _ in texts), self.tokenizer.pad_token_id
        return {
            "layout": layout,
            "pixel_values": pixels,
            "input_ids": torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in texts]),
            "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in texts]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in texts]),
        }

    def _encode(
        self, images: int, tiles: int, questions: list[tuple[str, str]], rng: random.Random
    ) -> tuple[list[int], list[int]]:
        """Return the token ids of a conversation, and labels: the ids of its answers and -100 elsewhere.

        Args:
            images: Number of images.
            tiles: Tiles per image.
            questions: Questions and answers, one pair per turn.
            rng: Chooses the wording around them.
        """
        prefix = ""
        if rng.random() < 0.3:
            system = rng.choice(("You are a helpful assistant.", "You describe pictures."))
            prefix = f"<|im_start|>system\n{system}<|im_end|>\n"
        image = "<img>" + "<IMG_CONTEXT>" * (TOKENS_PER_TILE * tiles) + "</img>\n"
        ids, labels = [], []
        for turn, (question, answer) in enumerate(questions):
            user = question
            if turn == 0 and images == 1:
                user = f"{question}\n{image}" if rng.random() < 0.2 else image + question
            elif turn == 0:
                name = rng.choice(("Image-{}: ", "Image-{}: ", "Image {}: ", ""))
                user = "".join(name.format(number) + image for number in range(1, images + 1)) + question
            begin = f"{prefix}<|im_start|>" if turn == 0 else "<|im_start|>"
            prompt_ids = self._ids(f"{begin}user\n{user}<|im_end|>\n<|im_start|>assistant\n")
            answer_ids, newline_ids = self._ids(f"{answer}<|im_end|>"), self._ids("\n")
            ids += prompt_ids + answer_ids + newline_ids
            labels += [-100] * len(prompt_ids) + answer_ids + [-100] * len(newline_ids)
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)


class PatchBatches(IterableDataset):
    """Endless batches of images of one tile, labelled with the shape that covers each patch.

    A label is 0 for no shape, 1 + the shape's index, or -100 if the patch has only the edge of one.
    """

    def __init__(self, batch: int, seed: int) -> None:
        self.batch, self.seed, self.image_processor = batch, seed, build_image_processor()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        rng = _worker_rng(f"patches/{self.seed}")
        side = TILE // PATCH
        while True:
            images, labels = [], []
            for _ in range(self.batch):
                mask = Image.new("L", (TILE, TILE))
                images.append(draw_scene(make_scene(rng), TILE, TILE, rng, mask))
                patches = np.asarray(mask).reshape(side, PATCH, side, PATCH).swapaxes(1, 2).reshape(side * side, -1)
                covered, shape = (patches > 0).mean(1), patches.max(1).astype(int)
                labels.append(np.where(covered > 0.25, shape, np.where(covered == 0, 0, -100)))
            pixels = self.image_processor(images, crop_to_patches=False, return_tensors="pt")["pixel_values"]
            yield {"pixel_values": pixels, "labels": torch.from_numpy(np.stack(labels))}


def _worker_rng(seed: str) -> random.Random:
    worker = get_worker_info()
    return random.Random(f"{seed}/{worker.id if worker else 0}")


def _load(dataset: IterableDataset, workers: int, device: str) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=device == "cuda"))


# ---------------------------------------------------------------------------------- training and evaluation


def train_eye(tower: torch.nn.Module, options: argparse.Namespace) -> None:
    """Train the vision tower alone to name the shape at each patch.

    64 labels per image teach it edges and corners far sooner than captions do: from captions alone it learns colours
    and counts, but not shapes.
    """
    head = torch.nn.Linear(tower.config.hidden_size, 1 + len(SHAPES)).to(options.device)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.rate, weight_decay=0.02, fused=True)
    weight = torch.tensor([0.1] + [1.0] * len(SHAPES), device=options.device)
    batches = _load(PatchBatches(2 * options.batch, options.seed), options.workers, options.device)
    start, step = time.monotonic(), 0
    while (done := (time.monotonic() - start) / (options.eye * 60)) < 1:
        share = min(1.0, (step + 1) / WARMUP) * (1 if done < 0.6 else 1 - 0.8 * (done - 0.6) / 0.4)
        _set_rate(optimizer, options.rate * share)
        batch = {key: value.to(options.device, non_blocking=True) for key, value in next(batches).items()}
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            logits = head(tower(pixel_values=batch["pixel_values"]).last_hidden_state[:, 1:])
        loss = cross_entropy(logits.float().flatten(0, 1), batch["labels"].flatten(), weight=weight)
        _update(optimizer, loss, parameters)
        step += 1
        if step % REPORT_EVERY == 0:
            on_shape = batch["labels"] > 0
            right = (logits.argmax(-1) == batch["labels"])[on_shape].float().mean().item()
            _report(part="eye", step=step, seconds=time.monotonic() - start, loss=loss.item(), right=right)


def train(options: argparse.Namespace) -> None:
    """Train for options.eye + options.minutes minutes, or options.minutes when resuming, and save the model."""
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    if options.resume:
        model = InternVLForConditionalGeneration.from_pretrained(options.resume).float()
    else:
        model = build_model(tokenizer)
    if options.device == "cpu":
        model.set_attn_implementation("eager")  # the backward pass of sdpa is slow on a CPU
    model.to(options.device).train()
    if options.eye and not options.resume:
        train_eye(model.model.vision_tower, options)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=options.rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    dataset = ConversationBatches(tokenizer, options.batch, options.seed)
    batches = _load(dataset, options.workers, options.device)
    start, step = time.monotonic(), 0
    while True:
        done = (time.monotonic() - start) / (options.minutes * 60)
        if options.steps:
            done = max(done, step / options.steps)
        if done >= 1:
            break
        dataset.phase.value = 2 if options.resume else int(done >= SIMPLE)
        cosine = 1.0 if done < HOLD else 0.5 * (1 + math.cos(math.pi * (done - HOLD) / (1 - HOLD)))
        _set_rate(optimizer, options.rate * min(1.0, (step + 1) / WARMUP) * max(cosine, 0.01))
        batch = next(batches)
        layout = batch.pop("layout")
        batch = {key: value.to(options.device, non_blocking=True) for key, value in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        answers = labels != -100  # only answer tokens need logits
        with torch.autocast(options.device, torch.bfloat16, enabled=options.bf16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][answers])
        loss = cross_entropy(logits.float(), labels[answers])
        _update(optimizer, loss, parameters)
        step += 1
        if step % REPORT_EVERY == 0:
            right = (logits.argmax(-1) == labels[answers]).float().mean().item()
            _report(step=step, seconds=time.monotonic() - start, loss=loss.item(), right=right, layout=layout)
    del batches  # ends the worker processes
    save(model.eval(), tokenizer, options.directory)
    print(f"saved {options.directory} after {step} steps, {time.monotonic() - start:.0f} s", flush=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.nn.Parameter]) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _report(**numbers: Any) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}), flush=True)


def new_questions(count: int) -> Iterator[tuple[str, list[dict[str, Any]], str]]:
    """Yield `count` conversations of each kind about new scenes: kind, messages, true answer to the last one."""
    rng = random.Random("held-out")
    kinds = [("caption", size) for size in ("one", "grid", "wide", "tall")]
    kinds += [(kind, "one") for kind in (*KINDS[1:], "pair", "turns")]
    for kind, layout in kinds:
        yielded = 0
        while yielded < count:
            scenes = [make_scene(rng) for _ in range(2 if kind == "pair" else 1)]
            if kind == "pair":
                turns = [ask_about_pair(*scenes, rng)]
            else:
                turn_kinds = rng.sample(KINDS, 3) if kind == "turns" else [kind]
                turns = [turn for turn_kind in turn_kinds if (turn := ask_about(scenes[0], turn_kind, rng))]
            if turns:
                width, height = SIZES[layout] if layout != "one" else (144, 144)
                images = [draw_scene(scene, width, height, rng) for scene in scenes]
                yield f"{kind}/{layout}", _messages(images, turns), turns[-1][1]
                yielded += 1


def _messages(images: list[Image.Image], turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    for number, image in enumerate(images, 1):
        if len(images) > 1:
            content.append({"type": "text", "text": f"Image-{number}: "})
        content.append({"type": "image", "image": image})
    messages = []
    for question, answer in turns:
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        content = []
    return messages[:-1]


def evaluate(options: argparse.Namespace) -> None:
    """Print the share of exact answers on new scenes, asked as an application would: chat template, greedy generate."""
    processor = load_processor(options.directory)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    model = AutoModelForImageTextToText.from_pretrained(options.directory, dtype=dtype).to(options.device).eval()
    start, questions = time.monotonic(), list(new_questions(options.n))
    right: dict[str, int] = {}
    for offset in range(0, len(questions), options.batch):
        part = questions[offset : offset + options.batch]
        inputs = processor.apply_chat_template(
            [messages for _, messages, _ in part],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(options.device, dtype=dtype)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (kind, messages, answer), text in zip(part, texts, strict=True):
            right[kind] = right.get(kind, 0) + (text.strip() == answer)
            if text.strip() != answer:
                print(f"wrong: {kind}, {messages[-1]['content'][-1]['text']!r}: {text!r} instead of {answer!r}")
    for kind, count in right.items():
        print(f"{kind:18} {count}/{options.n}")
    print(f"right: {sum(right.values())} of {len(questions)}, {time.monotonic() - start:.1f} s on {options.device}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("random", "train", "eval"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--minutes", type=float, default=25, help="train: duration, not counting --eye")
    parser.add_argument("--eye", type=float, default=7, help="train: minutes for the vision tower alone; 0 skips this")
    parser.add_argument("--rate", type=float, default=1e-3, help="train: the highest learning rate")
    parser.add_argument("--resume", type=Path, help="train: start from this checkpoint, without --eye")
    parser.add_argument("--steps", type=int, default=0, help="train: limit of steps after --eye; 0 is no limit")
    parser.add_argument("--batch", type=int, default=32, help="conversations per batch")
    parser.add_argument("--workers", type=int, default=0, help="train: number of processes that draw images")
    parser.add_argument("--bf16", action="store_true", help="train: use mixed precision")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--n", type=int, default=200, help="eval: conversations of each kind")
    options = parser.parse_args()
    if options.command == "random":
        torch.manual_seed(options.seed)
        tokenizer = build_tokenizer()
        save(build_model(tokenizer), tokenizer, options.directory)
    elif options.command == "train":
        train(options)
    else:
        evaluate(options)


if __name__ == "__main__":
    main()
