"""A model's processor for text and images, loaded without torchvision, and its chat template.

`AutoProcessor` insists on the model's *video* processor, which needs torchvision. Images do not: each family has an
image processor for Pillow and numpy. It is used even where torchvision is installed, so that pixels, and with them
answers, do not depend on what else is installed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name

from ...errors import ModelError
from ...types import ContentPart, Message


class NoVideos(dict[str, Any]):
    """A stand-in for a processor's video processor, with the attributes that a processor reads of one.

    An empty dict because a processor serialises itself to JSON for transformers' log when it is created.
    """

    model_input_names: tuple[str, ...] = ()
    num_frames = fps = None


class AcceptsNoVideos:
    """Mixin for a processor's class that accepts `NoVideos` as the video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        check = super().check_argument_for_proper_class  # type: ignore[misc]
        return check(argument_name, argument)


def load_processor(path: str, trust_remote_code: bool = False) -> Any:
    """Load the processor of the checkpoint in the directory `path`, for text and images only.

    Raises:
        ModelError: A part of the processor or the chat template is missing.
    """
    try:
        base = _processor_class(path, trust_remote_code)
        parts = [_load_part(name, path, trust_remote_code) for name in base.get_attributes()]
        settings, _ = base.get_processor_dict(path)
        _do_without_num2words(base)
        processor_class: Any = type(base.__name__, (AcceptsNoVideos, base), {})
        processor = processor_class.from_args_and_dict(parts, settings)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: the model's processor cannot be loaded: {type(error).__name__}: {error}") from error
    tokenizer = processor.tokenizer
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    if not processor.chat_template:
        raise ModelError(
            f"{path}: the model has no chat template (chat_template.jinja, or `chat_template` in the configuration of "
            "its processor or tokenizer): a base model, or an incomplete copy"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def render(processor: Any, messages: Sequence[Message]) -> str:
    """Render the messages with the model's chat template, up to the beginning of its answer."""
    chat = [{"role": message.role, "content": [_content(part) for part in message.parts]} for message in messages]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def image_token_id(processor: Any) -> int:
    """Return the token that is repeated in a prompt as the placeholder of an image."""
    token_id = getattr(processor, "image_token_id", None)
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token) if token_id is None else token_id)


def media_tokens(processor: Any) -> tuple[str, ...]:
    """Return the placeholders of images, videos and sound."""
    tokens = (getattr(processor, f"{name}_token", None) for name in ("image", "video", "audio"))
    return tuple(token for token in tokens if token)


def special_tokens(processor: Any) -> tuple[str, ...]:
    """Return the strings that the tokenizer reads as special tokens wherever they occur in a text."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    tokens = (*added, *tokenizer.all_special_tokens, *media_tokens(processor))
    return tuple(dict.fromkeys(token for token in tokens if token))


def template_sha256(processor: Any) -> str:
    template = processor.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(part: ContentPart) -> dict[str, str]:
    return {"type": "image"} if part.text is None else {"type": "text", "text": part.text}


def _processor_class(path: str, trust_remote_code: bool) -> Any:
    """Return the class that AutoProcessor would choose: named in a configuration file, or that of the model type."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        config_file = Path(path) / file
        settings = json.loads(config_file.read_text()) if config_file.is_file() else {}
        if trust_remote_code and "AutoProcessor" in settings.get("auto_map", {}):
            return get_class_from_dynamic_module(settings["auto_map"]["AutoProcessor"], path)
        if known := processor_class_from_name(settings["processor_class"]) if settings.get("processor_class") else None:
            return known
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if type(config) in PROCESSOR_MAPPING:
        return PROCESSOR_MAPPING[type(config)]
    raise ModelError(f"{path}: transformers has no processor for models of type {config.model_type!r}")


def _load_part(name: str, path: str, trust_remote_code: bool) -> Any:
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, padding_side="left")
    if name == "image_processor":
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code)
    if name == "video_processor":
        return NoVideos()
    raise ModelError(f"{path}: the model's processor needs a {name!r}, which this engine does not support")


def _do_without_num2words(processor_class: type[ProcessorMixin]) -> None:
    # SmolVLM's processor refuses to be created without this library, which spells out a video's number of frames.
    module = sys.modules[processor_class.__module__]
    if getattr(module, "num2words", ...) is None:
        module.num2words = str  # type: ignore[attr-defined]
