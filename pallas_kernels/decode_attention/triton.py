"""Attention of a few new tokens over a cache, in Triton.

A program has a KV head of a sequence, all queries of its group for all new tokens (the rows of a
matrix instruction) and a share of the keys.  Shares are added up by a second kernel.  A window of
up to 256 positions is read at once, before anything is computed: all its loads are under way
together, which counts more than their number.
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
from pallas_kernels.decode_attention.reference import MAX_QUERIES, refused
from pallas_kernels.filling import up
from pallas_kernels.triton import ANYWHERE

MAX_ROWS = 256
MAX_AT_ONCE = 256  # positions of a window
MIN_ROWS = MIN_KEYS = 16  # that a matrix instruction has
# Programs that keep an H100's memory busy; more only add to what is to be summed.
PROGRAMS = 128
BFLOAT16_ROWS = 128  # from which on shares of bfloat16 results are stored as such


@dataclasses.dataclass(frozen=True)
class Config:
    """How a call is cut.

    Attributes:
      keys: of a block.
      splits: programs that share a sequence's keys.
      stages, warps: for Triton.
    """

    keys: int = 64
    splits: int = 1
    stages: int = 3
    warps: int = 4


def configure(batch: int, kv_heads: int, rows: int, slots: int, window: int | None) -> Config:
    """What was fastest on an H100, in a study that this follows."""
    warps = 8 if rows > 64 else 4
    if window is not None and window + MAX_QUERIES <= MAX_AT_ONCE:
        return Config(stages=1, warps=8 if batch == 1 else warps)
    keys = slots if window is None else window
    splits = max(1, min(PROGRAMS // (batch * kv_heads), keys // 128))
    return Config(splits=1 << (splits.bit_length() - 1), warps=warps)


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    _, t, _, group, _ = q.shape
    if reason := online_softmax.refused(q, k, v) or refused(t, v.shape[1], window):
        return reason
    if _rows(t, group) > MAX_ROWS:
        return f"{t} tokens of {group} query heads a KV head are more than {MAX_ROWS} rows"
    return None


def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int[Array, "B T"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "B T K G V"]:
    """`reference.decode_attention`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    batch, t, kv_heads, group, _ = q.shape
    slots, width = v.shape[1], v.shape[-1]
    rows = _rows(t, group)
    config = config or configure(batch, kv_heads, rows, slots, window)
    if sink is None:
        sink = jnp.full((kv_heads, group), -jnp.inf)
    shape = _Shape(t, group, q.shape[-1], width, slots, window, causal)
    splits = config.splits
    out = jax.ShapeDtypeStruct((batch, t, kv_heads, group, width), q.dtype)
    # Of many rows they are as many bytes as some thousand keys.
    stored = jnp.bfloat16 if rows >= BFLOAT16_ROWS else jnp.float32
    sums = jax.ShapeDtypeStruct((batch, kv_heads, splits, rows, width), stored)
    norms = jax.ShapeDtypeStruct((batch, kv_heads, splits, rows, 2), jnp.float32)
    results = pl.pallas_call(
        functools.partial(_kernel, shape=shape, config=config),
        out_shape=(out,) if splits == 1 else (sums, norms),
        grid=(kv_heads, splits, batch),
        in_specs=[ANYWHERE] * 5,
        out_specs=(ANYWHERE,) * (1 if splits == 1 else 2),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="decode_attention",
    )(q, k, v, positions, sink)
    if splits == 1:
        return results[0]
    return pl.pallas_call(
        functools.partial(_combine, shape=shape, splits=splits),
        out_shape=out,
        grid=(rows, kv_heads, batch),
        in_specs=[ANYWHERE] * 3,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="decode_attention_combine",
    )(*results, sink)


def _rows(t: int, group: int) -> int:
    return max(MIN_ROWS, pl.next_power_of_2(t * group))


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Sizes and options of a call: T, G, H, V, S and what is visible."""

    t: int
    group: int
    head: int
    width: int
    slots: int
    window: int | None
    causal: bool

    def at_once(self) -> list[tuple[int, int]] | None:
        """Blocks of keys to read together, as offsets and sizes; None for a loop over blocks."""
        if self.window is None or self.window + self.t - 1 > MAX_AT_ONCE:
            return None
        return online_softmax.parts(up(self.window + self.t - 1, MIN_KEYS))


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    position_ref: Any,
    sink_ref: Any,
    *out_refs: Any,
    shape: _Shape,
    config: Config,
) -> None:
    kv, split, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    rows = _rows(shape.t, shape.group)
    row = jnp.arange(rows)
    there = row < shape.t * shape.group
    token, head = jnp.where(there, row // shape.group, 0), jnp.where(there, row % shape.group, 0)
    own = jnp.where(there, plt.load(position_ref.at[b, token]), -1)
    newest = jnp.max(own)
    oldest = jnp.min(jnp.where(own < 0, newest, own))
    last = own if shape.causal else jnp.where(own < 0, -1, newest)
    first = jnp.maximum(0, own - shape.window + 1) if shape.window else jnp.zeros_like(own)

    q = [
        plt.load(q_ref.at[b, token[:, None], kv, head[:, None], (start + jnp.arange(size))[None]])
        for start, size in online_softmax.parts(shape.head)
    ]

    def load(position: Any, size: int) -> tuple[list[Array], Array, Array]:
        """Keys [N, H], values [N, V] and the positions of N keys."""
        at = position + jnp.arange(size)
        slot = at % shape.slots if shape.window else jnp.minimum(at, shape.slots - 1)
        keys = [
            plt.load(k_ref.at[b, slot[:, None], kv, (start + jnp.arange(width))[None, :]])
            for start, width in online_softmax.parts(shape.head)
        ]
        values = plt.load(v_ref.at[b, slot[:, None], kv, jnp.arange(shape.width)[None, :]])
        return keys, values, at

    def add(sums: Any, loaded: Any, masked: bool) -> online_softmax.Sums:
        keys, values, at = loaded
        seen = (at[None, :] <= last[:, None]) & (at[None, :] >= first[:, None]) if masked else None
        return online_softmax.add(sums, q, keys, values, shape.head, seen)

    sums = online_softmax.begin(rows, shape.width)
    begin = jnp.maximum(0, oldest - shape.window + 1) if shape.window else jnp.int32(0)
    blocks = shape.at_once() if config.splits == 1 else None
    if blocks is not None:
        loaded = [load(begin + start, size) for start, size in blocks]
        for block in loaded:
            sums = add(sums, block, True)
    else:
        n = config.keys
        count = pl.cdiv(newest + 1 - begin, n)
        share = pl.cdiv(count, config.splits)
        low = jnp.minimum(split * share, count)
        high = jnp.minimum(low + share, count)
        # Blocks that all rows see whole come first where there is no window.
        whole = jnp.clip((oldest + 1) // n, low, high) if shape.window is None else low

        def body(masked: bool, i: Any, sums: Any) -> online_softmax.Sums:
            return add(sums, load(begin + i * n, n), masked)

        sums = jax.lax.fori_loop(low, whole, functools.partial(body, False), sums)
        sums = jax.lax.fori_loop(whole, high, functools.partial(body, True), sums)
    column = jnp.arange(shape.width)[None, :]
    if len(out_refs) == 1:
        y = online_softmax.finish(sums, plt.load(sink_ref.at[kv, head]))
        # Beyond the end where there is no query: the interpreter writes there, masked or not.
        to = jnp.where(there, token, shape.t)[:, None]
        into = out_refs[0].at[b, to, kv, head[:, None], column]
        plt.store(into, y.astype(out_refs[0].dtype), mask=there[:, None])
        return
    (total_ref, norm_ref), (total, top, norm) = out_refs, sums
    plt.store(total_ref.at[b, kv, split, row[:, None], column], total.astype(total_ref.dtype))
    plt.store(norm_ref.at[b, kv, split, row, jnp.zeros_like(row)], top)
    plt.store(norm_ref.at[b, kv, split, row, jnp.ones_like(row)], norm)


def _combine(
    total_ref: Any, norm_ref: Any, sink_ref: Any, out_ref: Any, *, shape: _Shape, splits: int
) -> None:
    row, kv, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(row < shape.t * shape.group)
    def _() -> None:
        token, head = row // shape.group, row % shape.group
        split, column = jnp.arange(splits), jnp.arange(shape.width)
        tops = plt.load(norm_ref.at[b, kv, split, row, jnp.zeros_like(split)])
        norms = plt.load(norm_ref.at[b, kv, split, row, jnp.ones_like(split)])
        totals = plt.load(total_ref.at[b, kv, split[:, None], row, column[None, :]])
        top = jnp.max(tops)
        shrink = jnp.exp2(tops - top)
        total = jnp.sum(totals.astype(jnp.float32) * shrink[:, None], axis=0)
        norm = jnp.sum(norms * shrink)
        sums = (total[None], top[None], norm[None])
        y = online_softmax.finish(sums, plt.load(sink_ref.at[kv, head])[None])[0]
        plt.store(out_ref.at[b, token, kv, head, column], y.astype(out_ref.dtype))
