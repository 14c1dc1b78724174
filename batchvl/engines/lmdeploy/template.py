"""Which chat template LMDeploy is given."""

from __future__ import annotations

import difflib
import hashlib
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ...errors import ModelError, OptionError

INTERNLM2 = frozenset({"internvl-internlm2", "internvl2-internlm2", "internvl2_5"})
RETIRED = INTERNLM2 | {"internvl-phi3", "internvl2-phi3", "internvl-zh-hermes2"}
"""Names that LMDeploy's and InternVL's documents use and LMDeploy has dropped for the model's own template."""

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
"""The form of InternLM2's chats, for an InternVL of that family whose folder brings no template."""


class Template:
    """The template of a run: what LMDeploy's pipeline is given, and a note where it is not the one that was named.

    path: the model's folder. name: of `--chat-template`. Raises OptionError, ModelError where there is none.
    """

    def __init__(self, path: str, name: str | None, trust_remote_code: bool) -> None:
        from lmdeploy.model import MODELS, BaseChatTemplate, ChatTemplateConfig, get_chat_template

        self.note: str | None = None
        self.config: Any = None
        known = sorted(set(MODELS.module_dict) - {"base"})
        if name in known:
            self.config = ChatTemplateConfig(name, model_path=path)
        elif name is not None and name not in RETIRED:
            self.config = ChatTemplateConfig.from_json(_json(name, known))
        found = get_chat_template(path, self.config, trust_remote_code=trust_remote_code)
        if name in RETIRED:
            self.note = f"--chat-template {name}: LMDeploy dropped this name; the model's own template is used instead"
        if self.config is None and type(found) is BaseChatTemplate:
            if name not in INTERNLM2:
                raise ModelError(
                    f"{path}: the model brings no chat template that works (chat_template of its tokenizer): "
                    "name one with --chat-template, or write one into a JSON file"
                )
            self.config = ChatTemplateConfig("base", **CHATML)
            found = get_chat_template(path, self.config)
            self.note = f"--chat-template {name}: LMDeploy dropped this name; InternLM2's form of chats is used instead"
        self.sha256 = hashlib.sha256(_text(found).encode()).hexdigest()

    @property
    def fields(self) -> dict[str, Any] | None:
        """Of `config`, for another process to make it of."""
        return None if self.config is None else asdict(self.config)


def _json(name: str, known: list[str]) -> str:
    """The text of a file with a ChatTemplateConfig, once it is one that LMDeploy takes as it is meant.

    Of a `model_name` that it does not know LMDeploy would make a template without any roles. Raises OptionError.
    """
    from lmdeploy.model import ChatTemplateConfig

    where, file = f"--chat-template {name}", Path(name)
    if not file.is_file():
        close = difflib.get_close_matches(name, known, 3) or known
        raise OptionError(
            f"{where}: LMDeploy knows no such template, and there is no such file; "
            f"want one of {', '.join(close)}, or a JSON file with the fields of its ChatTemplateConfig"
        )
    try:
        text = file.read_text(encoding="utf-8")
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise OptionError(f"{where}: cannot be read as JSON: {error}") from None
    kinds = {field.name: list if field.name == "stop_words" else str for field in fields(ChatTemplateConfig)}
    for field, value in found.items():
        if field not in kinds:
            raise OptionError(f"{where}: has a field {field!r}; want {', '.join(kinds)}")
        if value is not None and not isinstance(value, kinds[field]):
            raise OptionError(f"{where}: {field} is no {'list' if kinds[field] is list else 'string'}")
    base = found.get("model_name")
    if base in RETIRED:
        raise OptionError(f"{where}: LMDeploy dropped the template {base!r}; the model's own needs no --chat-template")
    if base not in known and not (found.get("user") and found.get("assistant")):
        named = f"model_name {base!r} is no template that LMDeploy knows" if base else "names no model_name"
        raise OptionError(f"{where}: {named}, and without one `user` and `assistant` must say how a turn begins")
    return text


def _text(template: Any) -> str:
    """What the template is made of: the tokenizer's Jinja text, or LMDeploy's own pieces."""
    tokenizer = getattr(template, "tokenizer", None)
    if tokenizer is not None:
        return json.dumps(tokenizer.chat_template, sort_keys=True)
    return json.dumps([type(template).__name__, vars(template)], sort_keys=True, default=str)
