"""Messages in OpenAI chat form."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import InvalidMessages

_ROLES = ("system", "user", "assistant")


class ChatMessage(NamedTuple):
    """A message of a row: its role, and its texts and numbers of images."""

    role: str
    content: list[str | int]


def parse_chat(messages: list[Any]) -> list[ChatMessage]:
    """Check a row's messages, whose image parts have numbers, and return them. The user has the last turn.

    >>> parse_chat([{"role": "user", "content": [{"type": "image", "image": 0}, {"type": "text", "text": "What?"}]}])
    [ChatMessage(role='user', content=[0, 'What?'])]

    Raises:
        InvalidMessages: They are not a chat, or do not end with a message of the user.
    """
    chat = [_parse_message(at, message) for at, message in enumerate(messages)]
    if not chat or chat[-1].role != "user":
        found = f"a message of the {chat[-1].role}" if chat else "nothing"
        raise InvalidMessages(f"messages: end with {found}, expected the user's turn")
    return chat


def _parse_message(at: int, message: Any) -> ChatMessage:
    if not isinstance(message, dict):
        raise InvalidMessages(
            f"messages[{at}]: found {type(message).__name__}, expected an object with role and content"
        )
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES or (role == "system" and at):
        where = " (system only at the beginning)" if role == "system" else ""
        raise InvalidMessages(f"messages[{at}]: found role {role!r:.40}, expected system, user or assistant{where}")
    if isinstance(content, str):
        return ChatMessage(role, [content])
    if not isinstance(content, list):
        kind = type(content).__name__
        raise InvalidMessages(f"messages[{at}]: found content of type {kind}, expected a string or a list of parts")
    return ChatMessage(role, _parse_parts(at, role, content))


def _parse_parts(at: int, role: str, content: list[Any]) -> list[str | int]:
    """Return texts and numbers of images. Consecutive texts are joined by a line feed."""
    parts: list[str | int] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text" and isinstance(part.get("text"), str):
            if parts and isinstance(parts[-1], str):
                parts[-1] += "\n" + part["text"]
            else:
                parts.append(part["text"])
        elif kind == "image" and type(part.get("image")) is int:
            if role != "user":
                raise InvalidMessages(
                    f"messages[{at}]: found an image in a message of the {role}, expected it in a user's"
                )
            parts.append(part["image"])
        else:
            raise InvalidMessages(
                f"messages[{at}]: found a part of type {kind!r:.40}, expected text, image_url or image"
            )
    return parts or [""]
