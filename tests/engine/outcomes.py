"""Requests, what came of them, and their records, without a model."""

from typing import Any

from mimo_jax.decoding.outputs import Completion, GenerationOutput, Metrics, TokenLogprob
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.engine.records import Record, completion_record, failure_record
from mimo_jax.engine.requests import Failure, Request


def request(line: int, prompt: Any = "ä\n", field: str = "prompt", **fields: Any) -> Request:
    """A request; `fields` are of `SamplingParams` or the convention."""
    convention = fields.pop("convention", "plain")
    params = SamplingParams(**{"seed": 1, **fields})
    return Request(line, f"id-{line}", field, prompt, params, convention)


def output(*texts: str, logprobs: list[TokenLogprob] | None = None) -> GenerationOutput:
    """A completion for each text."""
    completions = tuple(Completion(t, [1, 2], "stop", logprobs) for t in texts or ("ö\n",))
    metrics = Metrics(0.25, 0.5, 3, 2 * len(completions), (2, 1), (3, 3))
    return GenerationOutput([7, 8, 9], completions, metrics)


def done(line: int, prompt: Any = "ä\n", **fields: Any) -> Record:
    """The record of a completed request."""
    return completion_record(request(line, prompt, **fields), output())


def failure(line: int, message: str = "no") -> Failure:
    """A line that can't be read."""
    return Failure(line, None, "invalid_request", message, "plain", f"{message}-0")


def failed(line: int, message: str = "no") -> Record:
    """Its record."""
    return failure_record(failure(line, message))
