"""What a prompt may be, whichever convention its line has."""

from __future__ import annotations

import json
from typing import Any

PROMPT_FIELDS = ("prompt", "messages", "token_ids")
_EXPECTED = {
    "prompt": "a string",
    "messages": "a list of chat messages",
    "token_ids": "a list of integers",
}
MAX_TOKEN_ID = 2**31 - 1
# What chat templates know of; the rest they would drop without a word.
MESSAGE_FIELDS = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


def check_prompt(field: str, value: Any) -> Any:
    """A prompt as the tokenizer takes it: the text parts of a chat message become one string.

    Concatenated, as the released chat template does it (MODEL_SPEC 6).

    Args:
      field: one of PROMPT_FIELDS.
      value: from JSON.

    Raises:
      ValueError: it is empty, of another type, or has messages with unknown fields or with parts
        that are no text.
    """
    if field == "prompt":
        right = isinstance(value, str)
    else:
        item = dict if field == "messages" else int
        right = isinstance(value, list) and all(type(x) is item for x in value)
    if not right or not value:
        raise ValueError(f"{field} is {shown(value)}; it must be {_EXPECTED[field]}, and not empty")
    if field == "token_ids" and not 0 <= min(value) <= max(value) <= MAX_TOKEN_ID:
        wrong = next(x for x in value if not 0 <= x <= MAX_TOKEN_ID)
        raise ValueError(f"token_ids has {shown(wrong)}; ids are from 0 to {MAX_TOKEN_ID}")
    if field == "messages":
        return [_joined(message, i) for i, message in enumerate(value)]
    return value


def _joined(message: dict[str, Any], i: int) -> dict[str, Any]:
    unknown = [name for name in message if name not in MESSAGE_FIELDS]
    if unknown:
        raise ValueError(
            f"message {i} has the unknown field {shown(unknown[0])}; known are "
            f"{', '.join(MESSAGE_FIELDS)}"
        )
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for part in content:
        right = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not right or part["type"] != "text" or not isinstance(part["text"], str):
            raise ValueError(
                f"the content of message {i} has the part {shown(part)}; parts must be text: "
                '{"type": "text", "text": "..."}'
            )
        texts.append(part["text"])
    return {**message, "content": "".join(texts)}


def shown(value: Any, most: int = 60) -> str:
    """A JSON value for an error message, cut to `most` characters."""
    text = json.dumps(value)
    return text if len(text) <= most else f"{text[:most]}..."
