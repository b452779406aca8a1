"""Requests as lines of OpenAI's batch API.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}

What the engine doesn't do is accepted only with the value that asks for nothing (`"stream": false`,
`"presence_penalty": 0`); null always is.  `model` may be any name: the one served is in the answer.
"""

from __future__ import annotations

import difflib
from typing import Any

from mimo_jax.engine.prompts import check_prompt, shown

KEYS = ("custom_id", "method", "url", "body")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Fields of SamplingParams by the same name; the last three are extensions, named as vLLM's.
_SAMPLING = (
    *("temperature", "top_p", "max_tokens", "stop", "seed", "n"),
    *("top_k", "min_p", "ignore_eos"),
)
# Values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "store": (False,),
    "stream": (False,),
    "stream_options": (),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
# They name things for the service's own books and change no completion.
_LABELS = ("model", "user", "safety_identifier", "prompt_cache_key")
_LIMITS = ("max_completion_tokens", "logprobs", "top_logprobs", "best_of")
_KNOWN = (*_SAMPLING, *_NEUTRAL, *_LABELS, *_LIMITS, "messages", "prompt")

_MESSAGE_FIELDS = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", "reasoning_content"),
}
_EMPTY_MESSAGE_FIELDS = ("name", "refusal", "audio", "function_call", "tool_calls", "tool_call_id")


def is_batch_line(fields: dict[str, Any]) -> bool:
    """Whether an object is a line of OpenAI's batch API rather than a plain request."""
    return "custom_id" in fields or "body" in fields


def parse(fields: dict[str, Any]) -> tuple[str, Any, dict[str, Any]]:
    """What a line asks for.

    Args:
      fields: the line without its custom_id.

    Returns:
      One of PROMPT_FIELDS, its value, and fields of SamplingParams (values not yet checked).

    Raises:
      ValueError: something is missing, unknown, of a wrong type, or can't be done here.
    """
    extra = [name for name in fields if name not in KEYS]
    if extra:
        raise ValueError(
            f"an OpenAI batch line has {', '.join(KEYS)} and nothing else; found {', '.join(extra)}"
        )
    if fields.get("method") != "POST":
        raise ValueError(f'method is {shown(fields.get("method"))}; it must be "POST"')
    url, body = fields.get("url"), fields.get("body")
    if url not in (CHAT, COMPLETIONS):
        raise ValueError(f"url is {shown(url)}; it must be {CHAT} or {COMPLETIONS}")
    if not isinstance(body, dict):
        raise ValueError(f"body is {shown(body)}; it must be an object with the request's fields")
    body = {name: value for name, value in body.items() if value is not None}
    _check_known(body)
    field, prompt = _chat_prompt(body) if url == CHAT else _text_prompt(body)
    sampling = {name: body[name] for name in _SAMPLING if name in body}
    sampling |= _max_tokens(body, url == CHAT)
    sampling |= _logprobs(body, url == CHAT)
    return field, prompt, sampling


def _check_known(body: dict[str, Any]) -> None:
    for name, value in body.items():
        if name in _LABELS and not (isinstance(value, str) and value):
            raise ValueError(f"{name} is {shown(value)}; it must be a non-empty string")
        if name not in _KNOWN:
            near = difflib.get_close_matches(name, _KNOWN, n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else "leave it out"
            raise ValueError(f"body has the unknown field {shown(name)}; {hint}")
        if name in _NEUTRAL and not any(_same(value, x) for x in _NEUTRAL[name]):
            also = " or ".join(f"give {shown(x)}" for x in _NEUTRAL[name])
            raise ValueError(
                f"{name} is {shown(value)}, which this engine doesn't support: leave it out"
                + (f" or {also}" if also else "")
            )
    if "best_of" in body and not _same(body["best_of"], body.get("n", 1)):
        raise ValueError(
            f"best_of is {shown(body['best_of'])}, which this engine doesn't support: leave it out "
            "or give the value of n"
        )


def _same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _chat_prompt(body: dict[str, Any]) -> tuple[str, Any]:
    if "prompt" in body:
        raise ValueError(f"body has prompt, which is for {COMPLETIONS}; give messages here")
    messages = body.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _check_message(i, message)
    return "messages", check_prompt("messages", messages)


def _check_message(i: int, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in _MESSAGE_FIELDS:
        raise ValueError(
            f"the role of message {i} is {shown(role)}; it must be {' or '.join(_MESSAGE_FIELDS)}"
        )
    if not isinstance(content, str | list):
        raise ValueError(
            f"the content of message {i} is {shown(content)}; it must be a string or text parts"
        )
    for name, value in message.items():
        if name in _EMPTY_MESSAGE_FIELDS and value in (None, []):
            continue
        if name not in _MESSAGE_FIELDS[role]:
            raise ValueError(
                f"message {i}, of the {role}, has {shown(name)}, which this engine doesn't "
                "support: leave it out"
            )
    if not isinstance(message.get("reasoning_content"), str | None):
        raise ValueError(f"the reasoning_content of message {i} must be a string")


def _text_prompt(body: dict[str, Any]) -> tuple[str, Any]:
    if "messages" in body:
        raise ValueError(f"body has messages, which is for {CHAT}; give prompt here")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and any(isinstance(x, str | list) for x in prompt):
        raise ValueError("prompt is a list of prompts; give each a line of its own")
    field = "token_ids" if isinstance(prompt, list) else "prompt"
    return field, check_prompt(field, prompt)


def _max_tokens(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    if "max_completion_tokens" not in body:
        return {}
    value = body["max_completion_tokens"]
    if not chat:
        raise ValueError("max_completion_tokens is for chat completions; give max_tokens here")
    if not _same(value, body.get("max_tokens", value)):
        raise ValueError(
            f"max_tokens is {shown(body['max_tokens'])} and max_completion_tokens {shown(value)}; "
            "give one of them"
        )
    return {"max_tokens": value}


def _logprobs(body: dict[str, Any], chat: bool) -> dict[str, Any]:
    asked, top = body.get("logprobs"), body.get("top_logprobs")
    if not chat:
        if top is not None:
            raise ValueError("top_logprobs is for chat completions; give logprobs its number here")
        return {} if asked is None else {"logprobs": asked}
    if asked is not None and not isinstance(asked, bool):
        raise ValueError(f"logprobs is {shown(asked)}; for chat completions it is true or false")
    if top is not None and not asked and not _same(top, 0):
        raise ValueError(f"top_logprobs is {shown(top)} without logprobs; give logprobs true, too")
    return {"logprobs": 0 if top is None else top} if asked else {}
