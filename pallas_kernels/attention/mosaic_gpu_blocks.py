"""Attention of many tokens over all keys, for Hopper; see `mosaic_gpu`.

A program has 128 tokens of one query head, 64 for each of two warpgroups; a third fills a ring of
blocks of keys and values.  The two take turns with the tensor cores: one multiplies while the other
computes its softmax (FlashAttention-3, arXiv 2407.08608, section 3.1).  Programs of the latest
tokens, which see most, come first, and those of heads that read the same keys come together.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu_parts import (
    ALIGNED,
    EMPTY,
    LOG2E,
    PART,
    ROWS,
    Span,
    add_product,
    fill_registers,
    load_queries,
    multiply_keys,
    parts_type,
    store_parts,
    tiles_type,
    write,
)
from pallas_kernels.mosaic_gpu import accumulator

TOKENS = 2 * ROWS  # of a program
PRODUCER = 2  # the warpgroup after the two that compute
PRODUCER_REGISTERS, COMPUTE_REGISTERS = 40, 232


@dataclasses.dataclass(frozen=True)
class Config:
    """Choices of the kernel over all keys.

    Attributes:
      keys: of a block, a multiple of 64.
      stages: blocks of the ring.
    """

    keys: int = 128
    stages: int = 2


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """Blocks of keys that a program reads: those that need masks, then those that don't.

    Attributes:
      start: the first key; a multiple of 8.
      count: of blocks.
      whole: how many, from the first one on, have no key after any of the tokens.
      masked: how many are read first.
      keys: of a block.
    """

    start: Any
    count: Any
    whole: Any
    masked: Any
    keys: int

    def first_key(self, step: Any) -> Any:
        """Of the block of a step: first blocks from `whole` on, then those from 0 on."""
        beyond = self.count - self.whole
        block = step + lax.select(step < beyond, self.whole, -beyond)
        return pl.multiple_of(self.start + block * self.keys, ALIGNED)


def _blocks(span: Span, keys: int) -> _Blocks:
    """For a program's 128 tokens."""
    first = span.first
    start = lax.div(first, ALIGNED) * ALIGNED
    count = lax.div(lax.max(span.end(TOKENS) - start, 0) + keys - 1, keys)
    nothing = jnp.zeros_like(count)
    if span.window is not None:
        return _Blocks(start, count, nothing, count, keys)
    before = lax.min(span.last, span.offset) + 1
    whole = lax.min(lax.div(lax.max(before - start, 0), keys), count)
    # Before the first key there may be up to seven others.
    begins = lax.select(first > start, jnp.ones_like(count), nothing)
    return _Blocks(start, count, whole, lax.min(count - whole + begins, count), keys)


def scratch_types(head: int, value: int, config: Config) -> dict[str, Any]:
    """Buffers and barriers of a program."""
    stages = config.stages
    return {
        "tokens": parts_type(1, head, value),
        "k": tiles_type(stages, config.keys, head),
        "v": tiles_type(stages, config.keys, value),
        "queries": plgpu.Barrier(num_arrivals=head // PART, num_barriers=2),
        "k_full": plgpu.Barrier(num_barriers=stages),
        "v_full": plgpu.Barrier(num_barriers=stages),
        "k_empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "v_empty": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "turn": plgpu.Barrier(num_barriers=2),
    }


def program(
    span: Span,
    sequence: Any,
    tiles: int,
    group: int,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
    config: Config,
) -> None:
    """128 tokens of a query head, over all keys that they see."""
    sink_ref, q_ref, k_ref, v_ref, out_ref = refs
    q_head, warpgroup = lax.axis_index("head"), lax.axis_index("warpgroup")
    first_token = (tiles - 1 - lax.axis_index("tile")) * TOKENS
    span = dataclasses.replace(span, offset=span.offset + first_token)
    blocks = _blocks(span, config.keys)

    @pl.when(warpgroup == PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
        _fill(blocks, scratch, k_ref, v_ref, (sequence, lax.div(q_head, group)), config)

    @pl.when(warpgroup != PRODUCER)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        row = warpgroup * ROWS
        at = (sequence, pl.ds(pl.multiple_of(first_token + row, ROWS), ROWS), q_head)
        parts, arrived = scratch["tokens"].at[warpgroup, 0], scratch["queries"].at[warpgroup]
        load_queries(q_ref.at[at], parts, arrived)
        top, total = (EMPTY, 0.0) if sink_ref is None else (sink_ref[q_head], 1.0)
        carry = (
            fill_registers((ROWS, out_ref.shape[-1]), 0.0),
            fill_registers((ROWS,), top),
            fill_registers((ROWS,), total),
        )
        plgpu.barrier_wait(arrived)
        acc, total = _over_blocks(blocks, span, row, scratch, parts, carry, config)
        write(span.without_padding(row, acc), total, parts)
        store_parts(parts, ROWS, out_ref.at[at])
        plgpu.wait_smem_to_gmem(0)


def _fill(
    blocks: _Blocks,
    scratch: dict[str, Any],
    k_ref: Any,
    v_ref: Any,
    place: tuple[Any, Any],
    config: Config,
) -> None:
    """Copies the blocks of a sequence and a head into the ring."""
    sequence, kv_head = place
    rings = [(k_ref, "k"), (v_ref, "v")]

    @pl.loop(0, blocks.count)
    def _(step: Any) -> None:
        slot = lax.rem(step, config.stages)
        at = (sequence, pl.ds(blocks.first_key(step), config.keys), kv_head)
        for ref, name in rings:
            empty = scratch[f"{name}_empty"].at[slot]
            pl.when(step >= config.stages)(functools.partial(plgpu.barrier_wait, empty))
            full = scratch[f"{name}_full"].at[slot]
            plgpu.copy_gmem_to_smem(ref.at[at], scratch[name].at[slot], full)

    # No barrier may be left halfway.
    @pl.loop(lax.max(blocks.count - config.stages, 0), blocks.count)
    def _(step: Any) -> None:
        for _, name in rings:
            plgpu.barrier_wait(scratch[f"{name}_empty"].at[lax.rem(step, config.stages)])


def _over_blocks(
    blocks: _Blocks,
    span: Span,
    row: Any,
    scratch: dict[str, Any],
    queries: Any,
    carry: tuple[Any, Any, Any],
    config: Config,
) -> tuple[Any, Any]:
    """A warpgroup's weighted sum of values, float32[64, V], and its sums of weights.

    Args:
      row: its first token among the program's.
      carry: weighted sum, largest score and sum of weights so far.
    """
    warpgroup, turn = lax.div(row, ROWS), scratch["turn"]
    scale = scratch["k"].shape[-1] ** -0.5 * LOG2E

    def take_turn() -> None:
        plgpu.barrier_wait(turn.at[warpgroup])

    def pass_turn() -> None:
        plgpu.barrier_arrive(turn.at[1 - warpgroup])

    def wait_for_keys(step: Any) -> None:
        full = scratch["k_full"].at[lax.rem(step, config.stages)]
        pl.when(step < blocks.count)(lambda: plgpu.barrier_wait(full))

    def update(step: Any, carry: Any, *, masked: bool) -> Any:
        acc, top, total = carry
        slot = lax.rem(step, config.stages)

        def multiply(scores: Any) -> Any:
            multiply_keys(scores, queries, scratch["k"].at[slot])
            pass_turn()
            return scores[...]

        scores = pl.run_scoped(multiply, accumulator(config.keys))
        plgpu.barrier_arrive(scratch["k_empty"].at[slot])
        if masked:
            visible = span.visible(row, blocks.first_key(step), config.keys)
            scores = jnp.where(visible, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(axis=1) * scale)
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(new_top, scores.shape, [0]))
        acc, total = acc * lax.broadcast_in_dim(shrink, acc.shape, [0]), total * shrink
        rounded = weights.astype(jnp.bfloat16)
        plgpu.barrier_wait(scratch["v_full"].at[slot])
        take_turn()
        # After the turn and not before: 664 TFLOP/s, not 619, in a prototype on an H100.
        total = total + weights.sum(axis=1)
        acc = add_product(
            acc, rounded, scratch["v"].at[slot], scratch, lambda: wait_for_keys(step + 1)
        )
        plgpu.barrier_arrive(scratch["v_empty"].at[slot])
        return acc, new_top, total

    pl.when(warpgroup == 1)(pass_turn)
    wait_for_keys(jnp.int32(0))
    take_turn()
    carry = lax.fori_loop(0, blocks.masked, functools.partial(update, masked=True), carry)
    acc, _, total = lax.fori_loop(
        blocks.masked, blocks.count, functools.partial(update, masked=False), carry
    )
    pass_turn()
    pl.when(warpgroup == 0)(take_turn)
    return acc, total
