"""A decode batch whose rows come and go, for continuous batching.

A row of the batch is a slot.  Prompts are read beside the slots, in lanes with caches of their own,
a piece at a time; what has been read is copied into a slot, where the row goes on.  All shapes are
fixed, so nothing is compiled once each has occurred, and nothing has to be cleared: caches are
located by position (`mimo_jax.model.cache`).

The last token of a prompt is not read but is the newest token of its slot, whose keys are not in
the cache yet.  So the first token is drawn as all others are, and completions of the same prompt
share all that was read of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from mimo_jax.decoding import sampling
from mimo_jax.decoding.autoregressive import Decoder
from mimo_jax.decoding.sampling import RowParams, SamplingParams
from mimo_jax.decoding.state import DecodeState, Seen, ended_rows
from sharding.types import axes_of, entries, on_mesh


@dataclasses.dataclass(frozen=True)
class Piece:
    """Part of a prompt, and where it is read.

    Attributes:
      lane: the lane; it has read what precedes.
      start: position of the first token.
      tokens: token ids.
      following: the token after the last one.
    """

    lane: int
    start: int
    tokens: Sequence[int]
    following: int


class Slots:
    """The device's side of continuous batching: reading prompts, and steps of all rows.

    Calls return before the device has done anything; what `decode` returns is waited for when it is
    looked at.

    Args:
      decoder: what decodes; several may not use one at the same time.
      slots: rows of the batch.
      lanes: prompts that can be read at once.
      max_len: positions of a row's cache, prompt and completion together.
      top_logprobs: how many most probable tokens are reported beside each, or None.

    Raises:
      ShardingError: the mesh does not divide slots or lanes.
      ValueError: max_len is not positive or exceeds the model's.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        slots: int,
        lanes: int,
        max_len: int,
        top_logprobs: int | None = None,
    ):
        self.decoder, self.slots, self.lanes, self.max_len = decoder, slots, lanes, max_len
        self._top = top_logprobs
        self._leaves = decoder.weights()
        self._lanes = decoder.empty(lanes, max_len)
        decoder.begin(slots)
        cache, drafts = decoder.empty(slots, max_len)
        tokens, positions, remaining = decoder.put((np.zeros(slots, np.int32),) * 3)
        self._state = DecodeState(cache, tokens, positions, remaining, drafts)
        nobody = [SamplingParams(temperature=0.0)] * slots
        self._params = decoder.put(sampling.row_params(nobody, [0] * slots))
        self._asked: dict[int, SamplingParams] = {}  # for, by the row in each slot

    def read(self, pieces: Sequence[Piece], length: int) -> None:
        """Reads pieces of at most `length` tokens, each in its own lane."""
        shape = (self.lanes, length)
        tokens, following = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        positions = np.full(shape, -1, np.int32)
        for piece in pieces:
            n = len(piece.tokens)
            tokens[piece.lane, :n] = piece.tokens
            following[piece.lane, :n] = [*piece.tokens[1:], piece.following]
            positions[piece.lane, :n] = np.arange(piece.start, piece.start + n)
        tokens, positions, following = self.decoder.put((tokens, positions, following))
        self._lanes = self.decoder.read(self._leaves, tokens, positions, following, self._lanes)

    def snapshot(self, lane: int) -> Any:
        """What a lane has read, to go on from in other lanes."""
        with self.decoder.on_mesh():
            return _taken(self._lanes, np.int32(lane))

    def restore(self, lane: int, snapshot: Any) -> None:
        """Makes a lane one that has read what another had."""
        with self.decoder.on_mesh():
            self._lanes = _copied(self._lanes, snapshot, np.int32(0), np.int32(lane))

    def insert(
        self,
        slot: int,
        lane: int | None,
        newest: tuple[int, int],
        params: SamplingParams,
        seed: int,
        budget: int,
    ) -> None:
        """Begins a row: in a slot, with what a lane has read, which stays there.

        Args:
          slot: a slot whose row is done.
          lane: where all of the prompt but its last token has been read; None if it has only one.
          newest: the prompt's last token, and its position.
          params: how the row is sampled.
          seed: of its randomness.
          budget: tokens that it may produce at most.
        """
        self._asked[slot] = params
        row = sampling.row_params([params], [seed])
        # Nothing that a lane holds is seen by a row at position 0.
        start = np.array([slot, lane or 0, *newest, budget], np.int32)
        with self.decoder.on_mesh():
            self._state, self._params = _begun(self._state, self._params, self._lanes, start, row)

    def end(self, slots: Sequence[int]) -> None:
        """Ends rows whose ends the device doesn't know of."""
        ended = np.zeros(self.slots, bool)
        ended[list(slots)] = True
        with self.decoder.on_mesh():
            self._state = ended_rows(self._state, *self.decoder.put((ended,)))

    def decode(self, slots: Iterable[int] | None = None) -> Seen:
        """Further tokens of all rows.

        Args:
          slots: those whose rows may go on; by default all that were begun.
        """
        going_on = self._asked if slots is None else slots
        rows = self._params.for_requests(self._asked[slot] for slot in going_on)
        self._state, seen = self.decoder.decode(self._leaves, self._state, rows, self._top)
        return seen


@jax.jit
def _taken(rows: Any, row: Array) -> Any:
    return jax.tree.map(lambda a: _row(a, row), rows)


@functools.partial(jax.jit, donate_argnames="rows")
def _copied(rows: Any, others: Any, source: Array, target: Array) -> Any:
    return jax.tree.map(lambda a, b: _with_row(a, _row(b, source), target), rows, others)


@functools.partial(jax.jit, donate_argnames=("state", "params"))
def _begun(
    state: DecodeState, params: RowParams, read: Any, start: Int32[Array, 5], row: RowParams
) -> tuple[DecodeState, RowParams]:
    """A row begun in a slot, from a lane; `start` has both, token, position and budget, and `row`
    what it asks for."""
    slot, lane = start[0], start[1]
    cache, drafts = _copied((state.cache, state.drafts), read, lane, slot)
    tokens, positions, remaining = (
        _with_row(old, start[i : i + 1], slot)
        for i, old in enumerate((state.tokens, state.positions, state.remaining), 2)
    )
    begun = DecodeState(cache, tokens, positions, remaining, drafts)
    return begun, jax.tree.map(lambda old, new: _with_row(old, new, slot), params, row)


def _row(x: Array, index: Array) -> Array:
    """One row [1, ...], which is on all devices that rows are split over."""
    axes = axes_of(entries(x)[0])

    def local(x: Array, index: Array) -> Array:
        first = jax.lax.axis_index(axes) * len(x) if axes else 0
        at = jnp.clip(index - first, 0, len(x) - 1)
        row = jax.lax.dynamic_slice_in_dim(x, at, 1)
        return jax.lax.psum(jnp.where(at == index - first, row, 0), axes) if axes else row

    return on_mesh(local, PartitionSpec(None, *entries(x)[1:]), x, index)


def _with_row(x: Array, row: Array, index: Array) -> Array:
    """Rows with one [1, ...] in place of another."""
    axes = axes_of(entries(x)[0])

    def local(x: Array, row: Array, index: Array) -> Array:
        first = jax.lax.axis_index(axes) * len(x) if axes else 0
        at = jnp.clip(index - first, 0, len(x) - 1)
        if axes:
            row = jnp.where(at == index - first, row, jax.lax.dynamic_slice_in_dim(x, at, 1))
        return jax.lax.dynamic_update_slice_in_dim(x, row, at, axis=0)

    return on_mesh(local, PartitionSpec(*entries(x)), x, row, index)
