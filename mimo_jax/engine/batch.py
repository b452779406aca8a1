"""The requests of a file on an engine."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator

from mimo_jax.decoding.outputs import GenerationOutput
from mimo_jax.engine.loop import Engine, Work
from mimo_jax.engine.requests import Failure, Request

Encode = Callable[[Request], list[int]]


def survey(
    requests: Iterable[Request], encode: Encode, limit: int
) -> tuple[int, dict[int, Failure]]:
    """What requests need of a cache, and which of them can't be completed.

    Only numbers are kept of the prompts, however many they are.

    Args:
      requests: well-formed ones.
      encode: gives the token ids of a prompt, or raises ValueError or TypeError.
      limit: positions of the cache at most, prompt and completion together.

    Returns:
      The positions that the longest one needs, at most `limit`, and failures by line.
    """
    longest, failures = 1, {}
    for request in requests:
        try:
            length = len(encode(request))
            if length >= limit:
                raise ValueError(
                    f"the prompt has {length} tokens, which leaves no room to generate within "
                    f"{limit} positions; shorten it"
                )
            longest = max(longest, length + request.params.max_tokens)
        except (ValueError, TypeError) as error:
            failures[request.line] = Failure.of(request, "invalid_prompt", str(error))
    return min(longest, limit), failures


def complete(
    engine: Engine, requests: Iterable[Request], encode: Encode
) -> Iterator[list[tuple[Request, GenerationOutput]]]:
    """Completes requests; they are encoded as they are needed.

    Yields:
      After every dispatch of steps the requests that have ended with it, often none.
    """
    under_way: dict[Hashable, Request] = {}

    def works() -> Iterator[Work]:
        for request in requests:
            seed = request.params.seed
            assert seed is not None  # a request of a file has one
            under_way[request.line] = request
            yield Work(request.line, encode(request), request.params, seed)

    for ended in engine.run(works()):
        yield [(under_way.pop(line), output) for line, output in ended]
