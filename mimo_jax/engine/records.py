"""Results as JSON: a record a line, in the convention that its request's line has.

A plain record repeats its request; one of OpenAI's batch API has the response's body as that API
documents it.  Both have three fields of ours: `line` and `fingerprint`, by which a run goes on and
shards are merged, and `metrics`.  All but `metrics` and the body's `created` is the same in every
run.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from mimo_jax.decoding.outputs import Completion, GenerationOutput, Metrics, TokenLogprob
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.engine.requests import Failure, Request

Record = dict[str, Any]
TokenText = Callable[[int], str]
# What OpenAI's API has in place of minus infinity, which JSON has not.
LEAST_LOGPROB = -9999.0
_REPLACEMENT = "\ufffd"


def completion_record(
    request: Request,
    output: GenerationOutput,
    model: str = "",
    token_text: TokenText | None = None,
) -> Record:
    """The record of a request that was completed.

    Args:
      request: what was asked for.
      output: what came of it.
      model: name of the model in OpenAI's form.
      token_text: the text of a token id, for log-probabilities in OpenAI's form; without it tokens
        are written as "token_id:5".
    """
    if request.convention == "plain":
        return _plain(request, output)
    chat = request.field == "messages"
    choice = _chat_choice if chat else _text_choice
    prompt, generated = output.metrics.prompt_tokens, output.metrics.generated_tokens
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{_unique(request)}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [
            {"index": i, **choice(c, request.params, token_text), "finish_reason": c.finish_reason}
            for i, c in enumerate(output.completions)
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
    }
    response = {"status_code": 200, "request_id": f"req-{_unique(request)}", "body": body}
    return {
        **_openai_head(request),
        "response": response,
        "error": None,
        **_metrics(output.metrics),
    }


def failure_record(failure: Failure) -> Record:
    """The record of a line that can't be completed."""
    if failure.convention == "plain":
        error = {"type": failure.type, "message": failure.message}
        return {**_plain_head(failure), "error": error}
    error = {"code": failure.type, "message": failure.message}
    return {**_openai_head(failure), "response": None, "error": error}


def is_failure(record: Record) -> bool:
    """Whether a record is that of a line that can't be completed."""
    return record.get("error") is not None


def is_record(value: Any) -> bool:
    """Whether a JSON value is a record of either convention."""
    if not isinstance(value, dict) or not isinstance(value.get("fingerprint"), str):
        return False
    line, error = value.get("line"), value.get("error")
    if type(line) is not int or line < 1 or not isinstance(error, dict | None):
        return False
    name = value.get("custom_id" if "custom_id" in value else "id")
    completed = isinstance(value.get("text"), str) or isinstance(value.get("response"), dict)
    return isinstance(name, str | None) and completed == (error is None)


def record_id(record: Record) -> str | None:
    """The request's id, or None where it couldn't be read."""
    return record["custom_id"] if "custom_id" in record else record["id"]


def first_choice(record: Record) -> tuple[str, str]:
    """The text and the finish_reason of a completion's record."""
    if "response" not in record:
        return record["text"], record["finish_reason"]
    choice = record["response"]["body"]["choices"][0]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return text, choice["finish_reason"]


def _plain_head(outcome: Request | Failure) -> Record:
    return {"line": outcome.line, "id": outcome.id, "fingerprint": outcome.fingerprint}


def _plain(request: Request, output: GenerationOutput) -> Record:
    m = output.metrics
    record = {
        **_plain_head(request),
        **request.echo(),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "usage": {"prompt_tokens": m.prompt_tokens, "completion_tokens": m.generated_tokens},
        **_metrics(m),
    }
    if request.params.n > 1 or request.params.logprobs is not None:
        record["completions"] = [_plain_completion(c) for c in output.completions]
    return record


def _plain_completion(completion: Completion) -> Record:
    record = dataclasses.asdict(completion)
    for token in record["logprobs"] or ():
        token["logprob"] = _logprob(token["logprob"])
        token["top"] = {i: _logprob(x) for i, x in token["top"].items()}
    return record


def _metrics(m: Metrics) -> Record:
    metrics: Record = {"ttft_s": _finite(m.ttft_s, 6), "tpot_s": _finite(m.tpot_s, 6)}
    if m.acceptance_lengths:
        metrics["tokens_per_round"] = _finite(m.tokens_per_round, 4)
        metrics["acceptance_by_position"] = [_finite(x, 4) for x in m.acceptance_by_position]
    if m.verify_s is not None and m.draft_s is not None:
        metrics |= {"verify_s": _finite(m.verify_s, 6), "draft_s": _finite(m.draft_s, 6)}
    return {"metrics": metrics}


def _unique(outcome: Request | Failure) -> str:
    """The same in every run, and different for every line."""
    return f"{outcome.line}-{outcome.fingerprint.replace('-', '')}"


def _openai_head(outcome: Request | Failure) -> Record:
    return {
        "line": outcome.line,
        "id": f"batch_req-{_unique(outcome)}",
        "custom_id": outcome.id,
        "fingerprint": outcome.fingerprint,
    }


def _chat_choice(
    completion: Completion, params: SamplingParams, token_text: TokenText | None
) -> Record:
    message = {"role": "assistant", "content": completion.text, "refusal": None}
    return {"message": message, "logprobs": _chat_logprobs(completion, params, token_text)}


def _text_choice(
    completion: Completion, params: SamplingParams, token_text: TokenText | None
) -> Record:
    logprobs = _text_logprobs(completion, params, token_text)
    return {"text": completion.text, "logprobs": logprobs}


def _chat_logprobs(
    completion: Completion, params: SamplingParams, token_text: TokenText | None
) -> Record | None:
    if params.logprobs is None:
        return None

    def entry(token_id: int, logprob: float) -> Record:
        text = _token(token_id, token_text)
        # A token that ends inside of a character has no text, and its bytes aren't known here.
        known = token_text is not None and _REPLACEMENT not in text
        encoded = list(text.encode("utf-8", "replace")) if known else None
        return {"token": text, "logprob": _logprob(logprob), "bytes": encoded}

    def token(t: TokenLogprob) -> Record:
        return {**entry(t.token_id, t.logprob), "top_logprobs": [entry(*x) for x in t.top.items()]}

    return {"content": [token(t) for t in completion.logprobs or ()], "refusal": None}


def _text_logprobs(
    completion: Completion, params: SamplingParams, token_text: TokenText | None
) -> Record | None:
    if params.logprobs is None:
        return None
    tokens, offsets, tops, offset = [], [], [], 0
    for t in completion.logprobs or ():
        text = _token(t.token_id, token_text)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        top: Record = {}
        for token_id, logprob in {**t.top, t.token_id: t.logprob}.items():
            name = _token(token_id, token_text)
            # Tokens that are parts of characters have the same text.
            top[f"token_id:{token_id}" if name in top else name] = _logprob(logprob)
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [_logprob(t.logprob) for t in completion.logprobs or ()],
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def _token(token_id: int, token_text: TokenText | None) -> str:
    return f"token_id:{token_id}" if token_text is None else token_text(token_id)


def _logprob(value: float) -> float | None:
    return None if math.isnan(value) else min(max(value, LEAST_LOGPROB), -LEAST_LOGPROB)


def _finite(value: float, digits: int) -> float | None:
    return round(value, digits) if math.isfinite(value) else None
