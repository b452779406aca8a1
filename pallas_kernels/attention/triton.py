"""Attention of many new tokens, in Triton.

A program has some tokens of a query head and goes through the keys that they see.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import online_softmax
from pallas_kernels.triton import ANYWHERE


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      tokens: of a program.
      keys: of a block.
      stages, warps: for Triton.
    """

    tokens: int = 128
    keys: int = 128
    stages: int = 2
    warps: int = 8


def configure(window: int | None) -> Config:
    """What was fastest on an H100, in a study that this follows."""
    return Config() if window is None else Config(64, 64, 2, 4)


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    del window
    return online_softmax.refused(q, k, v)


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T K G V"]:
    """`reference.attention`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    batch, t, kv_heads, group, _ = q.shape
    width = v.shape[-1]
    config = config or configure(window)
    if sink is None:
        sink = jnp.full((kv_heads, group), -jnp.inf)
    spans = jnp.stack([first_query, first_key, newest]).astype(jnp.int32)
    return pl.pallas_call(
        functools.partial(_kernel, window=window, config=config),
        out_shape=jax.ShapeDtypeStruct((batch, t, kv_heads, group, width), q.dtype),
        # The heads of a KV head together, which read the same keys; the longest programs first.
        grid=(kv_heads * group, pl.cdiv(t, config.tokens), batch),
        in_specs=[ANYWHERE] * 5,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="attention",
    )(q, k, v, spans, sink)


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    span_ref: Any,
    sink_ref: Any,
    out_ref: Any,
    *,
    window: int | None,
    config: Config,
) -> None:
    _, t, _, group, head = q_ref.shape
    slots, width = v_ref.shape[1], v_ref.shape[-1]
    kv, g = pl.program_id(0) // group, pl.program_id(0) % group
    tile, b = pl.num_programs(1) - 1 - pl.program_id(1), pl.program_id(2)
    first_query, first_key, newest = (plt.load(span_ref.at[jnp.int32(i), b]) for i in range(3))
    row = tile * config.tokens + jnp.arange(config.tokens)
    own = first_query + row
    there = (own >= 0) & (own <= newest)
    lowest = first_query + tile * config.tokens  # position of the first row
    source = jnp.minimum(row, t - 1)[:, None]
    q = [
        plt.load(q_ref.at[b, source, kv, g, (start + jnp.arange(size))[None, :]])
        for start, size in online_softmax.parts(head)
    ]

    def body(masked: bool, i: Any, sums: online_softmax.Sums) -> online_softmax.Sums:
        key = i * config.keys + jnp.arange(config.keys)
        at = jnp.minimum(key, slots - 1)[:, None]
        keys = [
            plt.load(k_ref.at[b, at, kv, (start + jnp.arange(size))[None, :]])
            for start, size in online_softmax.parts(head)
        ]
        values = plt.load(v_ref.at[b, at, kv, jnp.arange(width)[None, :]])
        seen = None
        if masked:
            position = (first_key + key)[None, :]
            seen = (position >= 0) & (position <= own[:, None])
            if window is not None:
                seen &= position > own[:, None] - window
        return online_softmax.add(sums, q, keys, values, head, seen)

    n = config.keys
    last = jnp.minimum(newest, lowest + config.tokens - 1)
    oldest = jnp.int32(0) if window is None else jnp.maximum(lowest - window + 1, 0)
    low = jnp.maximum(oldest - first_key, 0) // n
    high = jnp.maximum(pl.cdiv(last + 1 - first_key, n), low)
    # Blocks that all rows see whole; the first may have keys before a sequence begins.
    begun = pl.cdiv(jnp.maximum(-first_key, 0), n)
    whole = jnp.clip((lowest + 1 - first_key) // n, low, high)
    whole = low if window is not None else jnp.where(begun > low, low, whole)
    sums = online_softmax.begin(config.tokens, width)
    sums = jax.lax.fori_loop(low, whole, functools.partial(body, False), sums)
    sums = jax.lax.fori_loop(whole, high, functools.partial(body, True), sums)
    y = online_softmax.finish(sums, plt.load(sink_ref.at[kv, g]))
    y = jnp.where(there[:, None], y, 0.0)
    into = out_ref.at[b, row[:, None], kv, g, jnp.arange(width)[None, :]]
    plt.store(into, y.astype(out_ref.dtype), mask=(row < t)[:, None])
