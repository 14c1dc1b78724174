"""Images in the messages of a chat: moved to the row's images, and replaced by their numbers."""

from __future__ import annotations

from typing import Any

from ..errors import InvalidMessages
from ..types import ImageRef
from .image_refs import image_of


def number_images(messages: list[Any], column: list[ImageRef]) -> tuple[list[Any], list[ImageRef]]:
    """Replace each image part by `{"type": "image", "image": number}`.

    An image part without a source, `{"type": "image"}`, is a placeholder for the next image of the column. If there are
    no placeholders, the column's images come first, as they go before the text. Anything that is not a chat is returned
    unchanged: `Prompter` rejects it.

    Args:
        messages: The row's messages, in OpenAI chat form.
        column: The images of the row's image column.

    Returns:
        The messages, and the row's images in the order of their numbers.

    Raises:
        RowError: An image part has a bad source.
    """
    sources = [_source(part) for message in messages for part in _parts(message) if _is_image(part)]
    if not sources:
        return messages, column
    has_placeholders = None in sources
    images = [] if has_placeholders else list(column)
    # A placeholder without an image is numbered, too: `Prompter` counts and reports the mismatch.
    numbers = iter(range(len(images), len(images) + len(sources)))
    remaining = iter(column if has_placeholders else ())
    for at, source in enumerate(sources, 1):
        if source is not None:
            images.append(image_of(source, f"messages, image {at}"))
        elif (image := next(remaining, None)) is not None:
            images.append(image)
    images.extend(remaining)
    return [
        {
            **message,
            "content": [
                {"type": "image", "image": next(numbers)} if _is_image(part) else part for part in _parts(message)
            ],
        }
        if _parts(message)
        else message
        for message in messages
    ], images


def placeholders(messages: list[Any]) -> list[Any]:
    """Return what `number_images` has numbered with placeholders instead: for the same images, in a column.

    Images without a part, which go before the text, get placeholders before the first message of the user.

    >>> placeholders([{"role": "user", "content": [{"type": "image", "image": 1}, {"type": "text", "text": "?"}]}])
    [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'image'}, {'type': 'text', 'text': '?'}]}]
    """
    numbers = [part["image"] for message in messages for part in _parts(message) if _is_image(part)]
    if not numbers:
        return messages
    replaced = [
        {**message, "content": [_PLACEHOLDER if _is_image(part) else part for part in _parts(message)]}
        if _parts(message)
        else message
        for message in messages
    ]
    at = next((at for at, message in enumerate(replaced) if message.get("role") == "user"), 0)
    content = replaced[at].get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else _parts(replaced[at])
    replaced[at] = {**replaced[at], "content": [_PLACEHOLDER] * numbers[0] + text}
    return replaced


_PLACEHOLDER = {"type": "image"}


def _parts(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else []


def _is_image(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _source(part: dict[str, Any]) -> Any:
    """Return the image that a part refers to; None for a placeholder."""
    if part["type"] == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if not isinstance(url, str):
            raise InvalidMessages('messages: an image_url part without {"image_url": {"url": …}}')
        return url
    return next((part[name] for name in ("image", "url", "path") if part.get(name) is not None), None)
