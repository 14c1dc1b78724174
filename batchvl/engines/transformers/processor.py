"""A model's processor for text and pictures, loaded without torchvision, and its chat template.

`AutoProcessor` insists on a model's *video* processor, which needs torchvision. Pictures do not: each family has an
image processor on Pillow and numpy. It is used even where torchvision is installed, so that pixels, and with them
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
    """Stands where a processor wants its video processor; has what processors read of one without any video.

    An empty dict, because a processor writes itself as JSON to transformers' log when it is made.
    """

    model_input_names: tuple[str, ...] = ()
    num_frames = fps = None


class ImagesAndText:
    """Mixed into a processor's class: takes `NoVideos` for the video processor."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        check = super().check_argument_for_proper_class  # type: ignore[misc]
        return check(argument_name, argument)


def load_processor(path: str, trust_remote_code: bool = False) -> Any:
    """The processor of the checkpoint in the folder `path`: as AutoProcessor's, for text and pictures only.

    Raises ModelError where a part is missing or there is no chat template.
    """
    try:
        kind = _processor_class(path, trust_remote_code)
        parts = [_load_part(name, path, trust_remote_code) for name in kind.get_attributes()]
        settings, _ = kind.get_processor_dict(path)
        _do_without_num2words(kind)
        without_videos: Any = type(kind.__name__, (ImagesAndText, kind), {})
        processor = without_videos.from_args_and_dict(parts, settings)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path}: the model's processor cannot be loaded: {type(error).__name__}: {error}") from error
    tokenizer = processor.tokenizer
    if processor.chat_template is None:
        processor.chat_template = tokenizer.chat_template
    if not processor.chat_template:
        raise ModelError(
            f"{path}: the model has no chat template (chat_template.jinja, or `chat_template` in its processor's or "
            "tokenizer's configuration): a base model, or an incomplete copy"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def render(processor: Any, messages: Sequence[Message]) -> str:
    """The messages as the model's prompt, up to where its answer begins."""
    chat = [{"role": message.role, "content": [_content(part) for part in message.parts]} for message in messages]
    text: str = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text


def image_token_id(processor: Any) -> int:
    """The token that stands, repeated, where a picture goes."""
    found = getattr(processor, "image_token_id", None)
    return int(processor.tokenizer.convert_tokens_to_ids(processor.image_token) if found is None else found)


def special_tokens(processor: Any) -> tuple[str, ...]:
    """The strings that the tokenizer reads as control tokens wherever they stand in a text."""
    tokenizer = processor.tokenizer
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    media = [getattr(processor, f"{name}_token", None) for name in ("image", "video", "audio")]
    return tuple(dict.fromkeys(token for token in [*added, *tokenizer.all_special_tokens, *media] if token))


def template_sha256(processor: Any) -> str:
    template = processor.chat_template
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _content(part: ContentPart) -> dict[str, str]:
    return {"type": "image"} if part.text is None else {"type": "text", "text": part.text}


def _processor_class(path: str, trust_remote_code: bool) -> Any:
    """The class that AutoProcessor would take: named in a configuration file, or the model type's."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        settings = Path(path) / file
        found = json.loads(settings.read_text()) if settings.is_file() else {}
        if trust_remote_code and "AutoProcessor" in found.get("auto_map", {}):
            return get_class_from_dynamic_module(found["auto_map"]["AutoProcessor"], path)
        if known := processor_class_from_name(found["processor_class"]) if found.get("processor_class") else None:
            return known
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if type(config) in PROCESSOR_MAPPING:
        return PROCESSOR_MAPPING[type(config)]
    raise ModelError(f"{path}: found no processor for models of type {config.model_type!r}")


def _load_part(name: str, path: str, trust_remote_code: bool) -> Any:
    if name == "tokenizer":
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, padding_side="left")
    if name == "image_processor":
        return AutoImageProcessor.from_pretrained(path, backend="pil", trust_remote_code=trust_remote_code)
    if name == "video_processor":
        return NoVideos()
    raise ModelError(f"{path}: the model's processor wants a part {name!r}, which this engine does not serve")


def _do_without_num2words(kind: type[ProcessorMixin]) -> None:
    # SmolVLM's processor refuses to be made without this library, which it uses to spell a video's number of frames.
    module = sys.modules[kind.__module__]
    if getattr(module, "num2words", ...) is None:
        module.num2words = str  # type: ignore[attr-defined]
