"""Attention of many tokens in a window, for Hopper; see `mosaic_gpu`.

A program has 64 tokens of all heads of a group: the keys and values that they see stay in shared
memory, and two warpgroups go over the heads.
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
from pallas_kernels.mosaic_gpu import SHARED_MEMORY, accumulator

MAX_WINDOW = 128  # positions
WINDOW_KEYS = 192  # that 64 tokens see in such a window


def stride_of(window: int) -> int:
    """Tokens from a program's first one to the next's, if keys begin anywhere."""
    room = WINDOW_KEYS - (window - 1) - (ALIGNED - 1)
    return min(ROWS, room // ALIGNED * ALIGNED)


def fits(head: int, value: int) -> bool:
    """Whether a program's queries, keys and values fit shared memory."""
    return 2 * (4 * ROWS * max(head, value) + WINDOW_KEYS * (head + value)) <= SHARED_MEMORY


def scratch_types(head: int, value: int) -> dict[str, Any]:
    """Buffers and barriers of a program."""
    return {
        "tokens": parts_type(2, head, value),
        "k": tiles_type(WINDOW_KEYS, head),
        "v": tiles_type(WINDOW_KEYS, value),
        "queries": plgpu.Barrier(num_arrivals=head // PART, num_barriers=4),
        "k_full": plgpu.Barrier(),
        "v_full": plgpu.Barrier(),
    }


def program(
    span: Span,
    sequence: Any,
    tokens: int,
    group: int,
    refs: tuple[Any, ...],
    scratch: dict[str, Any],
) -> None:
    """64 tokens of a group of query heads, every other head by one of two warpgroups."""
    assert span.window is not None
    sink_ref, q_ref, k_ref, v_ref, out_ref = refs
    warpgroup, kv_head = lax.axis_index("warpgroup"), lax.axis_index("head")
    # Keys are read from a multiple of 8 on.  If too many are then read before the first one seen,
    # the last ones lack room, and programs have fewer tokens.
    before = lax.rem(span.offset - (span.window - 1) + (1 << 30), ALIGNED)
    fits = before + (span.window - 1) + ROWS <= WINDOW_KEYS
    least = stride_of(span.window)
    stride = lax.select(fits, jnp.int32(ROWS), jnp.int32(least))
    first_token = pl.multiple_of(lax.axis_index("tile") * stride, ALIGNED)
    span = dataclasses.replace(span, offset=span.offset + first_token)
    start = pl.multiple_of(lax.div(span.first, ALIGNED) * ALIGNED, ALIGNED)
    mine = lax.div(group - warpgroup + 1, 2)

    def place(i: Any, rows: int) -> Any:
        return sequence, pl.ds(first_token, rows), kv_head * group + warpgroup + 2 * i

    def load(i: Any) -> None:
        slot = lax.rem(i, 2)
        arrived = scratch["queries"].at[2 * warpgroup + slot]
        load_queries(q_ref.at[place(i, ROWS)], scratch["tokens"].at[warpgroup, slot], arrived)

    def store(i: Any, acc: Any, total: Any) -> None:
        parts = scratch["tokens"].at[warpgroup, lax.rem(i, 2)]
        write(acc, total, parts)
        for rows in {ROWS, least}:
            pl.when(stride == rows)(
                functools.partial(store_parts, parts, rows, out_ref.at[place(i, rows)])
            )

    def over_heads() -> None:
        keys = (sequence, pl.ds(start, WINDOW_KEYS), kv_head)
        for i, (name, ref) in enumerate((("k", k_ref), ("v", v_ref))):
            copy = functools.partial(
                plgpu.copy_gmem_to_smem, ref.at[keys], scratch[name], scratch[f"{name}_full"]
            )
            pl.when(warpgroup == i)(copy)
        pl.when(mine > 0)(lambda: load(jnp.int32(0)))
        plgpu.barrier_wait(scratch["k_full"])
        plgpu.barrier_wait(scratch["v_full"])

        @pl.loop(0, mine)
        def _(i: Any) -> None:
            slot = lax.rem(i, 2)
            plgpu.barrier_wait(scratch["queries"].at[2 * warpgroup + slot])

            def multiply(scores: Any) -> Any:
                multiply_keys(scores, scratch["tokens"].at[warpgroup, slot], scratch["k"])
                return scores[...]

            scores = pl.run_scoped(multiply, accumulator(WINDOW_KEYS))

            # Not during the product: a branch makes the compiler wait for its end.
            @pl.when(i + 1 < mine)
            def _() -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                load(i + 1)

            scores = jnp.where(span.visible(0, start, WINDOW_KEYS), scores, -jnp.inf)
            sink = EMPTY if sink_ref is None else sink_ref[place(i, ROWS)[-1]]
            sink = fill_registers((ROWS,), sink)
            scale = scratch["k"].shape[-1] ** -0.5 * LOG2E
            top = jnp.maximum(scores.max(axis=1) * scale, sink)
            weights = jnp.exp2(scores * scale - lax.broadcast_in_dim(top, scores.shape, [0]))
            total = weights.sum(axis=1)
            if sink_ref is not None:
                total = total + jnp.exp2(sink - top)
            acc = add_product(nothing, weights.astype(jnp.bfloat16), scratch["v"], scratch)
            store(i, span.without_padding(0, acc), total)

    nothing = fill_registers((ROWS, out_ref.shape[-1]), 0.0)
    is_tile, sees = first_token < tokens, span.end(ROWS) > start
    pl.when(is_tile & sees)(over_heads)

    @pl.when(is_tile & ~sees)
    def _() -> None:
        @pl.loop(0, mine)
        def _(i: Any) -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            store(i, nothing, fill_registers((ROWS,), 1.0))

    plgpu.wait_smem_to_gmem(0)
