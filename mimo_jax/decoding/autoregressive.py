"""Plain decoding: prefill in length buckets, then many tokens a dispatch on the device.

`Decoder` compiles two functions for a model: one runs the prompts and draws each row's first
token, the other draws a number of further tokens in a loop on the device.  The host only looks at
finished blocks of tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from mimo_jax.decoding import sampling
from mimo_jax.decoding.sampling import Logprobs, RowParams, SamplingParams
from mimo_jax.decoding.state import Block, DecodeState, Seen
from mimo_jax.decoding.static_batch import SMALLEST_BUCKET, StaticBatch
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.cache import KVCache, init_cache
from mimo_jax.model.placement import Placement
from mimo_jax.quant import QuantizedArray, dequantize
from sharding import mesh
from sharding.memory import check_memory
from sharding.types import put, replicated

# Tokens a dispatch: enough to hide the dispatch, few enough for text to stream.
STEPS = 16
# Quantised models of up to this many bytes, when dense, are dense while they generate.
EXPAND_BYTES = 2**30


class Decoder:
    """Runs batches of token prompts through a model.

    Args:
      model: the backbone.
      valid_vocabulary: ids from here on are never produced.
      eos_ids: tokens that end a row, unless its parameters say to ignore them.
      placement: the mesh the model is on, and its rules; None if it is on one device.

    Attributes:
      ways: into how many parts rows are split, of which batches have multiples.
      fitting: rows and lengths of static batches' caches that did fit (`check_memory`).
      depth: how many dispatches of `blocks` may be under way.  With two the device doesn't wait
        for the host between them, and does one in vain where an end-of-sequence token ends the
        batch; on CPUs, where host and device are the same, it is one.

    The module is flattened once: flattening a large one at every call costs milliseconds.
    """

    def __init__(
        self,
        model: MiMo,
        *,
        valid_vocabulary: int,
        eos_ids: Sequence[int],
        placement: Placement | None = None,
    ):
        self.placement = placement
        self.config = model.config
        self.valid_vocabulary = valid_vocabulary
        self.eos_ids = tuple(eos_ids)
        self.fitting: set[tuple[int, int]] = set()
        self._leaves, self._treedef = jax.tree.flatten(self._modules(model), is_leaf=_is_quantized)
        self.ways = 1 if placement is None else placement.batch_ways
        self.depth = 1 if jax.default_backend() == "cpu" else 2
        self._ran: set[tuple[Any, ...]] = set()
        static = ("top_logprobs",)
        self._prefill = jax.jit(self._prefill_step, static_argnames=static, donate_argnames="held")
        self._decode = jax.jit(
            self._decode_steps,
            static_argnames=(*self._options(), *static),
            donate_argnames="state",
        )
        self._read = jax.jit(self._read_step, donate_argnames="held")

    def _modules(self, model: MiMo) -> Any:
        """What the programs are given, flattened."""
        return model

    @property
    def least(self) -> int:
        """How many tokens a dispatch gives a row at least, if it doesn't end."""
        return STEPS

    @property
    def most(self) -> int:
        """How many it gives at most."""
        return STEPS

    @property
    def settled(self) -> bool:
        """Whether every program of steps that it chooses among has run with the batch at hand."""
        return True

    def _options(self) -> dict[str, Any]:
        """The static arguments of the next dispatch of steps."""
        return {"steps": STEPS}

    def begin(self, rows: int) -> None:
        """Gets ready for a batch of so many rows."""

    def empty(self, rows: int, max_len: int) -> tuple[KVCache, Any]:
        """The cache and the drafts of rows of which nothing has been read."""
        return init_cache(self.config, rows, max_len, placement=self.placement), None

    def weights(self) -> list[Any]:
        """What programs are given; small models are dequantised (`expanded`)."""
        return expanded(self._leaves, jnp.dtype(self.config.dtype))

    def read(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        following: Int32[Array, "B T"],
        held: Any,
    ) -> Any:
        """Reads tokens into what rows hold (`empty`), which is given away, and draws none.

        Args:
          leaves: `weights`.
          tokens: parts of prompts.
          positions: increasing by one along a row from where it was; -1 behind its end.
          following: the token after each.
          held: of the rows.
        """
        with self.on_mesh():
            return self._read(leaves, tokens, positions, following, held)

    def prefill(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        held: Any,
        rows: RowParams,
        remaining: Int32[Array, " B"],
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        """Reads whole prompts, as `read` does parts, and draws the token after each.

        Args:
          leaves, tokens, positions, held: as of `read`.
          rows: what rows ask for.
          remaining: how many tokens each may produce.
          top_logprobs: how many most probable tokens are reported beside each, or None.
        """
        with self.on_mesh():
            state, seen = self._prefill(
                leaves, tokens, positions, held, rows, remaining, top_logprobs=top_logprobs
            )
        return state, seen.on_its_way()

    def decode(
        self,
        leaves: list[Any],
        state: DecodeState,
        rows: RowParams,
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        """Sends the device further steps of a batch, whose state is given away."""
        options = self._options()
        shape = (*state.tokens.shape, state.cache.max_len)
        program = (*shape, rows.sampled, rows.narrowed, top_logprobs, *options.values())
        compiled = program not in self._ran
        self._ran.add(program)
        with self.on_mesh():
            state, seen = self._decode(leaves, state, rows, top_logprobs=top_logprobs, **options)
        return state, dataclasses.replace(seen, compiled=compiled).on_its_way()

    def learn(self, block: Block, seconds: float | None) -> None:
        """Looks at what a dispatch has produced, in how many seconds if nothing was compiled.

        The seconds are those until the host asked for it, if that was later.
        """

    def blocks(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        seeds: Sequence[int],
        *,
        max_len: int | None = None,
        stopped: set[int] | None = None,
    ) -> Iterator[Block]:
        """Generates for a batch of prompts, a block of tokens at a time.

        The first block has each row's first token.  Rows end at an end-of-sequence token or after
        max_tokens; the caller may end one sooner by adding its index to `stopped`.  While the
        caller looks at a block the device is at the next one (or ones, see `depth`), which still
        have tokens of rows that it ends meanwhile.

        Args:
          prompts: token ids of each row, at least one.
          params: sampling parameters of each row (`n` and `stop` are the caller's business).
          seeds: seed of each row.
          max_len: cache length; by default what the longest row needs, rounded up.
          stopped: rows to end, looked at between blocks.

        Raises:
          ValueError: a prompt is empty, or longer than the model or the cache allows.
          NotEnoughMemoryError: the cache would not fit; it has not been allocated.
        """
        batch = StaticBatch(self, prompts, params, seeds, max_len)
        return batch.blocks(set() if stopped is None else stopped)

    def lowered(
        self, rows: int, length: int, max_len: int
    ) -> tuple[jax.stages.Lowered, jax.stages.Lowered]:
        """The programs of prompts and of steps, lowered; the model may be of shapes.

        Args:
          rows: sequences of the batch.
          length: tokens of the padded prompts.
          max_len: positions of the cache.
        """
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        greedy = [SamplingParams(temperature=0.0)] * rows
        row_params = sampling.row_params(greedy, [0] * rows).for_requests(greedy)
        budgets = np.ones(rows, np.int32)
        held = jax.eval_shape(lambda: self.empty(rows, max_len))
        with self.on_mesh():
            prefill = self._prefill.trace(
                self._leaves, ids, ids, held, row_params, budgets, top_logprobs=None
            )
            state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), prefill.out_info)
            decode = self._decode.lower(
                self._leaves, state[0], row_params, top_logprobs=None, **self._options()
            )
            return prefill.lower(), decode

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """The context for what runs on the model's mesh."""
        # Not around a `yield`: the context would reach into the caller's code.
        return mesh.use(self.placement and self.placement.mesh)

    def put(self, tree: Any) -> Any:
        """Host arrays whose first dimension are the rows of a batch, on the devices."""
        if self.placement is None:
            return jax.device_put(tree)
        return put(tree, self.placement.mesh, *self.placement.rules.spec(["batch"]))

    def check_memory(self, rows: int, max_len: int) -> None:
        """Refuses caches that don't fit in the memory that is free.

        Raises:
          NotEnoughMemoryError: that many rows of that length don't; says what would help.
        """
        # A small one shows how they are split, which shapes don't.
        small = jax.tree.leaves(self.empty(self.ways, min(max_len, SMALLEST_BUCKET)))
        whole = jax.tree.leaves(jax.eval_shape(lambda: self.empty(self.ways, max_len)))
        one = sum(
            math.prod(a.sharding.shard_shape(b.shape)) * a.dtype.itemsize
            for a, b in zip(small, whole, strict=True)
        )
        devices = small[0].sharding.addressable_devices
        check_memory(
            dict.fromkeys(devices, one * -(-rows // self.ways)),
            f"{rows} rows of a cache of {max_len} positions",
            "decode fewer completions together (batch_size), make the cache shorter (max_len, "
            "max_tokens)",
        )

    def _prefill_step(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        held: Any,
        rows: RowParams,
        remaining: Int32[Array, " B"],
        *,
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        model = jax.tree.unflatten(self._treedef, leaves)
        hidden, cache, _ = model.hidden_states(tokens, positions, held[0])
        return self._first(model, hidden, positions, cache, tokens, rows, remaining, top_logprobs)

    def _read_step(
        self,
        leaves: list[Any],
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"],
        following: Int32[Array, "B T"],
        held: Any,
    ) -> Any:
        model = jax.tree.unflatten(self._treedef, leaves)
        return model.hidden_states(tokens, positions, held[0])[1], None

    def _first(
        self,
        model: MiMo,
        hidden: Float[Array, "B T D"],
        positions: Int32[Array, "B T"],
        cache: KVCache,
        tokens: Int32[Array, "B T"],
        rows: RowParams,
        remaining: Int32[Array, " B"],
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        """Draws each row's token after its prompt."""
        last = positions.max(axis=1)
        at = jnp.maximum(last, 0)[:, None, None]
        hidden = jnp.take_along_axis(hidden, at, axis=1)[:, 0]
        state = DecodeState(cache, tokens[:, 0], last, remaining)
        draw = functools.partial(self._draw, model, rows, top_logprobs)
        state, token, logprobs = draw(state, hidden)
        by_row = jax.tree.map(lambda a: a[:, None], logprobs)
        return state, replicated(Seen(token[:, None], by_row, state.remaining))

    def _decode_steps(
        self,
        leaves: list[Any],
        state: DecodeState,
        rows: RowParams,
        *,
        steps: int,
        top_logprobs: int | None,
    ) -> tuple[DecodeState, Seen]:
        model = jax.tree.unflatten(self._treedef, leaves)

        def step(state: DecodeState, _: None) -> tuple[DecodeState, Any]:
            tokens, positions = idle(state, state.tokens, state.positions)
            hidden, cache, _taps = model.hidden_states(
                tokens[:, None], positions[:, None], state.cache
            )
            state = dataclasses.replace(state, cache=cache)
            state, token, logprobs = self._draw(model, rows, top_logprobs, state, hidden[:, 0])
            return state, (token, logprobs)

        state, (tokens, logprobs) = jax.lax.scan(step, state, length=steps)
        by_row = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), logprobs)
        return state, replicated(Seen(tokens.T, by_row, state.remaining))

    def _draw(
        self,
        model: MiMo,
        rows: RowParams,
        top_logprobs: int | None,
        state: DecodeState,
        hidden: Array,
    ) -> tuple[DecodeState, Int32[Array, " B"], Logprobs | None]:
        """Draws the token after each row's newest one; rows that are done produce -1."""
        active = state.remaining > 0
        logits = sampling.mask_vocabulary(model.logits(hidden), self.valid_vocabulary)
        positions = state.positions + 1
        token = sampling.sample(logits, rows, positions)
        logprobs = None
        if top_logprobs is not None:
            logprobs = sampling.logprobs(logits, token, top_logprobs)
        ended = jnp.isin(token, jnp.asarray(self.eos_ids, jnp.int32)) & ~rows.ignore_eos
        state = DecodeState(
            state.cache,
            jnp.where(active, token, state.tokens),
            jnp.where(active, positions, state.positions),
            jnp.where(active & ~ended, state.remaining - 1, 0),
        )
        return state, jnp.where(active, token, -1), logprobs


def idle(
    state: DecodeState, tokens: Int32[Array, " B *n"], positions: Int32[Array, " B *n"]
) -> tuple[Int32[Array, " B *n"], Int32[Array, " B *n"]]:
    """What a step runs: of rows that are done the same token at no position, since a mixture of
    experts takes longer for rows whose tokens choose other experts."""
    active = (state.remaining > 0).reshape(-1, *[1] * (tokens.ndim - 1))
    return jnp.where(active, tokens, 0), jnp.where(active, positions, -1)


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


_dequantize = jax.jit(dequantize, static_argnames="dtype")


def expanded(weights: Sequence[Any], dtype: jnp.dtype) -> list[Any]:
    """The weights with dense ones for quantised, if those are few (EXPAND_BYTES), else as they are.

    A small model's loop spends most of its time dequantising when it does so at every step, and
    much even once a dispatch: mimo-tiny's, on 2 CPU cores, 2.6 of 4.3 ms a token.
    """
    size = sum(math.prod(w.shape) for w in weights if _is_quantized(w))
    if size * dtype.itemsize > EXPAND_BYTES:
        return list(weights)
    return [_dequantize(w, dtype=dtype) if _is_quantized(w) else w for w in weights]
