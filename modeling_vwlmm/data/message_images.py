"""The images of a conversation, in the order in which its template writes them."""

from typing import Any

from trl.data_utils import prepare_multimodal_messages

from ..files import describe


# Where a part of transformers' chat messages may hold an image
_HELD_AS = ("image", "url", "path", "base64")


def gather_images(
    messages: list[dict[str, Any]], images: list[Any], marker: str
) -> tuple[list[dict[str, Any]], list[Any]]:
    """The messages with a bare `{"type": "image"}` for each image, and the images in that order.

    A part may hold its image itself, as `image`, `url`, `path` or `base64`. The others get `images` one after another,
    as TRL does it. Messages whose contents are texts have all of `images` before their first user turn.

    Raises:
        ValueError: there are more or fewer parts without an image than `images`, a message is none, or its text holds
            the marker that templates write for an image.
    """
    messages = prepare_multimodal_messages([_checked(message) for message in messages], images=images)
    for message in messages:
        if any(marker in part.get("text", "") for part in message.get("content") or []):
            raise ValueError(
                f"the text of a message holds {marker}, which cannot be written as text: an image is a part "
                '{"type": "image"} of the content'
            )
    found: list[Any] = []
    placed = []
    for message in messages:
        if isinstance(message.get("content"), list):
            found += [part["image"] for part in message["content"] if "image" in part]
            content = [{k: v for k, v in part.items() if k != "image"} for part in message["content"]]
            message = {**message, "content": content}
        placed.append(message)
    return placed, found


def _checked(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"found the message {describe(message)}, expected one with a role and a content")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        return {**message, "content": [_checked_part(part) for part in content]}
    if content is not None and not isinstance(content, str):
        raise ValueError(f"found the content {describe(content)}, expected a text or a list of parts")
    return message


def _checked_part(part: Any) -> dict[str, Any]:
    """A part without the fields that Arrow fills with null, its image under the name `image`."""
    if not isinstance(part, dict):
        raise ValueError(f"found {describe(part)} in a content, expected parts with a type, 'text' or 'image'")
    part = {name: value for name, value in part.items() if value is not None}
    kind = part.get("type")
    if kind == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f"found a part of type 'text' with the text {describe(part.get('text'))}, expected a text")
    if kind == "image":
        held = [name for name in _HELD_AS if name in part]
        if len(held) > 1:
            raise ValueError(f"found a part with the fields {' and '.join(held)}, expected one image a part")
        if held and held[0] != "image":
            image = part.pop(held[0])
            part["image"] = f"data:image/;base64,{image}" if held[0] == "base64" else image
    elif kind != "text":
        raise ValueError(f"found a part of type {describe(kind)}, expected 'text' or 'image'")
    return part
