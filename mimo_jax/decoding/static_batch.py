"""A batch whose rows begin together, for streams and for measurements.

Prompts are padded to buckets of lengths, rows to powers of two, and the batch goes on until its
last row is done; `mimo_jax.decoding.slots` is the batch whose rows come and go.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Int32

from mimo_jax.decoding import sampling
from mimo_jax.decoding.sampling import SamplingParams
from mimo_jax.decoding.state import Block, Seen, ended_rows

if TYPE_CHECKING:
    from mimo_jax.decoding.autoregressive import Decoder

SMALLEST_BUCKET = 32


def bucket(length: int, limit: int, smallest: int = SMALLEST_BUCKET) -> int:
    """The power of two (at least `smallest`, at most `limit`) that `length` is padded to, so that
    few shapes are compiled."""
    return min(limit, max(smallest, 1 << (length - 1).bit_length()))


class StaticBatch:
    """A batch under way; its prompts are sent to the device at once.

    Args:
      decoder: what decodes.
      prompts: token ids of each row, at least one.
      params: sampling parameters of each row.
      seeds: seed of each row.
      max_len: cache length; by default what the longest row needs, rounded up.

    Attributes:
      leaves, state, rows: what the next dispatch is given (`Decoder.decode`).

    Raises:
      ValueError: a prompt is empty, or longer than the model or the cache allows.
      NotEnoughMemoryError: the cache would not fit; it has not been allocated.
    """

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        max_len: int | None,
    ):
        self._decoder, self._real = decoder, len(prompts)
        limit = checked_limit(prompts, decoder.config.max_position_embeddings, max_len)
        budget = [min(p.max_tokens, limit - len(t)) for t, p in zip(prompts, params, strict=True)]
        longest = max(len(t) + b for t, b in zip(prompts, budget, strict=True))
        cache_len = bucket(longest, limit, 256) if max_len is None else max_len
        # Batches are padded to powers of two, then to what the mesh divides, with rows that never
        # start.
        rows = -(-bucket(self._real, 1 << 30, 1) // decoder.ways) * decoder.ways
        padding = rows - self._real
        empty: list[int] = []
        prompts = [*prompts, *[empty] * padding]
        params = [*params, *[SamplingParams(temperature=0.0)] * padding]
        self._top = max((p.logprobs for p in params if p.logprobs is not None), default=None)
        # Together: array by array it would take the host some milliseconds.
        given = decoder.put(
            (
                *_padded(prompts, cache_len),
                sampling.row_params(params, [*seeds, *[0] * padding]).for_requests(params),
                np.asarray([*budget, *[0] * padding], np.int32),
            )
        )
        tokens, positions, self.rows, remaining = given
        decoder.begin(rows)
        if (rows, cache_len) not in decoder.fitting:
            decoder.check_memory(rows, cache_len)
            decoder.fitting.add((rows, cache_len))
        held = decoder.empty(rows, cache_len)
        with decoder.on_mesh():
            self.leaves = decoder.weights()
        self.state, self._first = decoder.prefill(
            self.leaves, tokens, positions, held, self.rows, remaining, self._top
        )
        # Dispatches that nobody has looked at, and when they were sent.
        self._sent: collections.deque[tuple[Seen, float]] = collections.deque()
        self._stopped: set[int] = set()

    def blocks(self, stopped: set[int]) -> Iterator[Block]:
        """Tokens of all rows, a block a dispatch; `Decoder.blocks` says more."""
        got = jax.device_get(self._first)
        yield Block.of(got).first(self._real)
        self._send(got, stopped)
        looked = 0.0
        while self._sent:
            seen, started = self._sent.popleft()
            got = jax.device_get(seen)
            began, looked = max(started, looked), time.perf_counter()
            block = Block.of(got)
            self._decoder.learn(block, None if got.compiled else looked - began)
            # Before the host does anything with the tokens: the device shall not wait for it.
            self._send(got, stopped)
            yield block.first(self._real)
            if stopped.issuperset(np.flatnonzero(got.remaining).tolist()):
                return

    def _send(self, got: Seen, stopped: set[int]) -> None:
        """Sends the device further steps, as many as rows need for sure or `Decoder.depth`.

        Args:
          got: what was last looked at.
          stopped: rows that the caller has ended.
        """
        decoder = self._decoder
        if not self._stopped.issuperset(stopped):
            self._stopped |= stopped
            ended = np.isin(np.arange(len(got.remaining)), list(stopped))
            with decoder.on_mesh():
                self.state = ended_rows(self.state, *decoder.put((ended,)))
        active = np.array(got.remaining)
        active[list(stopped)] = 0
        while len(self._sent) < decoder.depth and (active > len(self._sent) * decoder.most).any():
            started = time.perf_counter()
            self.state, seen = decoder.decode(self.leaves, self.state, self.rows, self._top)
            self._sent.append((seen, started))


def checked_limit(prompts: Sequence[Sequence[int]], positions: int, max_len: int | None) -> int:
    """The positions that a row of the cache has at most, of a model with so many.

    Raises:
      ValueError: a prompt is empty, or longer than the model or the cache allows.
    """
    limit, what = positions, "the model's max_position_embeddings"
    if max_len is not None and max_len < limit:
        limit, what = max_len, "the cache's max_len"
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {i} has no tokens; give it at least one")
        if len(prompt) >= limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, which leaves no room to generate within "
                f"{what} of {limit}; shorten it"
            )
    return limit


def _padded(
    prompts: Sequence[Sequence[int]], limit: int
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, "B T"]]:
    """Tokens and positions, padded on the right to a bucket; padding has position -1."""
    length = bucket(max(map(len, prompts)), limit)
    tokens = np.zeros((len(prompts), length), np.int32)
    positions = np.full((len(prompts), length), -1, np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
        positions[row, : len(prompt)] = np.arange(len(prompt))
    return tokens, positions
