"""Rotation, scaling and storing of a few new tokens' heads in one kernel, in Triton.

A program has a KV head of a token, with the query heads of its group.  XLA takes five kernels.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.attention.online_softmax import parts
from pallas_kernels.decode_attention.reference import MAX_QUERIES
from pallas_kernels.rotate_and_store.reference import Heads, rotary_angles
from pallas_kernels.triton import ANYWHERE


def unsupported(fused: Any, k_cache: Any, heads: Heads, ring: bool) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    del ring
    tokens, slots = fused.shape[1], k_cache.shape[1]
    if not fused.dtype == k_cache.dtype == jnp.bfloat16:
        return f"{fused.dtype} and a cache of {k_cache.dtype} are not both bfloat16"
    if tokens > MAX_QUERIES:
        return f"{tokens} tokens a sequence are more than {MAX_QUERIES}"
    if not heads.rotary:
        return "no dimension is rotated"
    return f"{tokens} tokens are more than {slots} slots" if tokens > slots else None


def rotate_and_store(
    fused: Float[Array, "B T C R"],
    positions: Int[Array, "B T"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K V"],
    *,
    heads: Heads,
    ring: bool,
    interpret: bool = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """`reference.rotate_and_store`, in place if the caches are donated; rounds once.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(fused, k_cache, heads, ring):
        raise NotImplementedError(reason)
    batch, tokens, chunks, _ = fused.shape
    kv_heads = chunks * heads.kv_heads
    # The same in every layer with these frequencies, and so computed once a step.
    angles = jnp.concatenate(rotary_angles(positions, heads.rotary, heads.theta), axis=-1)
    q = jax.ShapeDtypeStruct((batch, tokens, kv_heads, heads.group, heads.head), fused.dtype)
    caches = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (k_cache, v_cache)]
    return pl.pallas_call(
        functools.partial(_kernel, heads=heads, ring=ring),
        out_shape=(q, *caches),
        grid=(kv_heads, tokens, batch),
        in_specs=[ANYWHERE] * 5,
        out_specs=(ANYWHERE,) * 3,
        input_output_aliases={3: 1, 4: 2},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="rotate_and_store",
    )(fused, positions, angles, k_cache, v_cache)


def _kernel(
    fused_ref: Any,
    position_ref: Any,
    angle_ref: Any,
    _k_ref: Any,
    _v_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *,
    heads: Heads,
    ring: bool,
) -> None:
    kv, t, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    chunk, own = kv // heads.kv_heads, kv % heads.kv_heads
    n_q, n_k = heads.rows[:2]
    half, group = heads.rotary // 2, pl.next_power_of_2(heads.group)
    # Up to a power of two the last query head is computed again.
    row = jnp.minimum(jnp.arange(group), heads.group - 1)[:, None]

    def rotate(load: Any, store: Any) -> None:
        """A head's parts, from a function of columns to a function of columns and values."""
        for start, size in parts(half):
            column = start + jnp.arange(size)
            cos, sin = (plt.load(angle_ref.at[b, t, column + n]) for n in (0, half))
            first, second = load(column), load(column + half)
            store(column, first * cos - second * sin)
            store(column + half, second * cos + first * sin)
        for start, size in parts(heads.head - 2 * half):
            column = 2 * half + start + jnp.arange(size)
            store(column, load(column))

    def load(first: Any, column: Any) -> Array:
        return plt.load(fused_ref.at[b, t, chunk, first + column]).astype(jnp.float32)

    first_q = (own * heads.group + row) * heads.head

    def store_q(column: Any, value: Array) -> None:
        plt.store(q_ref.at[b, t, kv, row, column[None, :]], value.astype(q_ref.dtype))

    rotate(lambda column: load(first_q, column[None, :]), store_q)
    position = plt.load(position_ref.at[b, t])
    slots = k_ref.shape[1]

    @pl.when((position >= 0) if ring else (position >= 0) & (position < slots))
    def _() -> None:
        slot = position % slots if ring else position

        def store_k(column: Any, value: Array) -> None:
            plt.store(k_ref.at[b, slot, kv, column], value.astype(k_ref.dtype))

        rotate(functools.partial(load, n_q + own * heads.head), store_k)
        for start, size in parts(heads.value):
            column = start + jnp.arange(size)
            value = load(n_q + n_k + own * heads.value, column)
            if heads.value_scale is not None:
                value *= heads.value_scale
            plt.store(v_ref.at[b, slot, kv, column], value.astype(v_ref.dtype))
