"""Conversations for LMDeploy: messages in its form, and the chat template that turns them into a prompt."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...errors import ModelError, OptionError
from ...types import Message

INTERNVL = {"InternVLChatModel", "InternVLForConditionalGeneration", "InternS1ForConditionalGeneration"}
QWEN = {"Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"}
PLACEHOLDER = "image"
"""Stands for an image where only its position matters."""
TILE_PIXELS = 448 * 448
"""Pixels that count as a tile for models that do not cut images into tiles of their own."""

INTERNLM2_TEMPLATES = frozenset({"internvl-internlm2", "internvl2-internlm2", "internvl2_5"})
REMOVED_TEMPLATES = INTERNLM2_TEMPLATES | {"internvl-phi3", "internvl2-phi3", "internvl-zh-hermes2"}
"""Names from the documentation of LMDeploy and InternVL which LMDeploy has removed: it uses the model's template."""
CHATML = {
    "system": "<|im_start|>system\n",
    "eosys": "<|im_end|>\n",
    "user": "<|im_start|>user\n",
    "eoh": "<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n",
    "eoa": "<|im_end|>",
    "separator": "\n",
    "stop_words": ["<|im_end|>"],
}
"""InternLM2's chat format, for an InternVL of that family whose directory has no template."""


def image_settings(architecture: str, max_tiles: int | None) -> dict[str, int]:
    """Return what LMDeploy is given along with each image to limit its tiles.

    The `-hf` form of InternVL and Qwen2-VL are limited in their processors instead: see `limit_tiles`.

    Raises:
        OptionError: The architecture has no such setting.
    """
    if max_tiles is None or architecture in INTERNVL - {"InternVLChatModel"} | QWEN:
        return {}
    if architecture == "InternVLChatModel":
        return {"max_dynamic_patch": max_tiles}
    raise OptionError(
        f"--max-tiles: LMDeploy has no such setting for {architecture}; it has one for InternVL and Qwen2-VL"
    )


def limit_tiles(architecture: str, vision_model: Any, max_tiles: int | None) -> None:
    """Limit the tiles per image in the processor of LMDeploy's vision model, if that is where its setting is."""
    processor: Any = getattr(getattr(vision_model, "processor", None), "image_processor", None)
    if max_tiles is None or processor is None:
        return
    if architecture in QWEN:
        area = max_tiles * TILE_PIXELS
        processor.size = {"longest_edge": area, "shortest_edge": min(processor.size["shortest_edge"], area)}
    elif hasattr(processor, "max_patches"):
        processor.max_patches, processor.min_patches = max_tiles, min(processor.min_patches, max_tiles)


class Chat:
    """Converts messages to LMDeploy's form: OpenAI's, with images as PIL images.

    LMDeploy writes `<img>…</img>` and a line feed for each image of an InternVL. If the text after an image begins with
    a line feed, as in `Image-1: <IMAGE_TOKEN>\\nImage-2: …` from InternVL's documentation, that one is dropped.

    Args:
        architecture: The model's.
        settings: What goes along with each image, from `image_settings`.
    """

    def __init__(self, architecture: str, settings: Mapping[str, int]) -> None:
        self._adds_line_feed = architecture in INTERNVL
        self._settings = dict(settings)

    def messages(
        self, messages: Iterable[Message], get_image: Callable[[int], Any] = lambda _: PLACEHOLDER
    ) -> list[dict[str, Any]]:
        """Convert messages.

        Args:
            messages: The conversation so far.
            get_image: Returns the row's image with a number; by default only the positions of images are marked.
        """
        return [{"role": message.role, "content": self._content(message, get_image)} for message in messages]

    def _content(self, message: Message, get_image: Callable[[int], Any]) -> str | list[dict[str, Any]]:
        if all(part.image is None for part in message.parts):
            return "".join(part.text or "" for part in message.parts)
        content: list[dict[str, Any]] = []
        for part in message.parts:
            if part.image is not None:
                content.append({"type": "image_data", "image_data": {"data": get_image(part.image), **self._settings}})
            elif text := self._text(part.text or "", after_image=bool(content) and content[-1]["type"] != "text"):
                content.append({"type": "text", "text": text})
        return content

    def _text(self, text: str, *, after_image: bool) -> str:
        return text.removeprefix("\n") if after_image and self._adds_line_feed else text


class ChatTemplate:
    """The chat template of a run.

    Args:
        path: The model's directory.
        name: Value of `--chat-template`.
        trust_remote_code: Whether the tokenizer may run the model's own code.

    Raises:
        OptionError: There is no such template.
        ModelError: The model has none and none was named.
    """

    def __init__(self, path: str, name: str | None, trust_remote_code: bool) -> None:
        from lmdeploy.model import MODELS, BaseChatTemplate, ChatTemplateConfig, get_chat_template

        self.note: str | None = None
        """A remark for the user if another template is used than the one that was named."""
        self.config: Any = None
        """What LMDeploy's pipeline is given; None for the model's own template."""
        known = sorted(set(MODELS.module_dict) - {"base"})
        if name in known:
            self.config = ChatTemplateConfig(name, model_path=path)
        elif name is not None and name not in REMOVED_TEMPLATES:
            self.config = ChatTemplateConfig.from_json(_read_template_file(name, known))
        template = get_chat_template(path, self.config, trust_remote_code=trust_remote_code)
        if name in REMOVED_TEMPLATES:
            self.note = f"--chat-template {name}: LMDeploy removed this name; the model's own template is used instead"
        if self.config is None and type(template) is BaseChatTemplate:
            if name not in INTERNLM2_TEMPLATES:
                raise ModelError(
                    f"{path}: the model has no usable chat template (chat_template of its tokenizer): "
                    "choose one with --chat-template, or write one as a JSON file"
                )
            self.config = ChatTemplateConfig("base", **CHATML)
            template = get_chat_template(path, self.config)
            self.note = f"--chat-template {name}: LMDeploy removed this name; InternLM2's chat format is used instead"
        self.sha256 = hashlib.sha256(_source(template).encode()).hexdigest()

    @property
    def fields(self) -> dict[str, Any] | None:
        """The fields of `config`, from which another process can construct it."""
        return None if self.config is None else asdict(self.config)


def _read_template_file(name: str, known: list[str]) -> str:
    """Return the text of a file with a ChatTemplateConfig, after checking that LMDeploy takes it as it is meant.

    For a `model_name` that it does not know, LMDeploy would construct a template without any roles.

    Raises:
        OptionError: There is no such file, or it is invalid.
    """
    where, file = f"--chat-template {name}", Path(name)
    if not file.is_file():
        close = difflib.get_close_matches(name, known, 3) or known
        raise OptionError(
            f"{where}: neither a template that LMDeploy knows nor a file; "
            f"use one of {', '.join(close)}, or a JSON file with the fields of its ChatTemplateConfig"
        )
    try:
        text = file.read_text(encoding="utf-8")
        template = json.loads(text)
        if not isinstance(template, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise OptionError(f"{where}: cannot read it as JSON: {error}") from None
    _check_template_fields(template, where, known)
    return text


def _check_template_fields(template: dict[str, Any], where: str, known: list[str]) -> None:
    from lmdeploy.model import ChatTemplateConfig

    kinds = {field.name: list if field.name == "stop_words" else str for field in fields(ChatTemplateConfig)}
    for field, value in template.items():
        if field not in kinds:
            raise OptionError(f"{where}: unknown field {field!r}; the fields are {', '.join(kinds)}")
        if value is not None and not isinstance(value, kinds[field]):
            raise OptionError(f"{where}: {field} must be a {'list' if kinds[field] is list else 'string'}")
    base = template.get("model_name")
    if base in REMOVED_TEMPLATES:
        raise OptionError(
            f"{where}: LMDeploy removed the template {base!r}; without --chat-template the model's own is used"
        )
    if base not in known and not (template.get("user") and template.get("assistant")):
        problem = f"LMDeploy does not know the template {base!r} of model_name" if base else "there is no model_name"
        raise OptionError(f"{where}: {problem}, so `user` and `assistant` must give the beginning of a turn")


def _source(template: Any) -> str:
    """Return what the template is made of: the tokenizer's Jinja text, or LMDeploy's own pieces."""
    tokenizer = getattr(template, "tokenizer", None)
    if tokenizer is not None:
        return json.dumps(tokenizer.chat_template, sort_keys=True)
    return json.dumps([type(template).__name__, vars(template)], sort_keys=True, default=str)
