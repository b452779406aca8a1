"""Grouped-query attention with sliding windows and sinks (MODEL_SPEC 2.4 to 2.10)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import LayerSpec
from mimo_jax.model import cache as kv_cache
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.layers import (
    apply_rotary,
    contract,
    declare_o_proj,
    declare_sink,
    linear,
    rotary_angles,
)
from mimo_jax.model.parameters import Format, Make, ParamSpec, QKVRows, declare
from mimo_jax.model.taps import Taps
from pallas_kernels.attention.reference import softmax
from pallas_kernels.decode_attention.reference import slot_positions
from sharding.types import entries, reshard, sharding

QUERY_BLOCK = 256


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    window: int | None = None,
    sink: Float[Array, "K G"] | None = None,
) -> tuple[Float[Array, "B T K G V"], Float[Array, "B K G T S"]]:
    """Causal softmax attention by position; the definition of the operation.

    Each KV head has a group of G query heads.  A query sees the keys at positions 0..its own, the
    last `window` of them (itself included) if a window is given.  A negative position marks an
    empty key slot or a padding query; a query that sees no key gets zeros.  `sink` adds one logit a
    query head to the normaliser (MODEL_SPEC 2.9).

    Returns:
      The output in v's dtype, and the float32 weights (which sum to less than 1 with a sink).
    """
    scores = contract("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    visible = (k_positions[:, None, :] >= 0) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = softmax(scores, sink)
    return contract("bkgts,bskv->btkgv", weights.astype(v.dtype), v).astype(v.dtype), weights


def attend_in_blocks(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    *,
    window: int | None = None,
    sink: Float[Array, "K G"] | None = None,
) -> Float[Array, "B T K G V"]:
    """`attend` for long prompts: queries go in blocks, so that scores never need T x S memory.

    With a window, a block of queries looks only at the keys it can reach.  For that the last T keys
    must be those of the queries themselves, in the same order, where a row's positions increase by
    one and padding stands only at its ends; the S - T keys before them may be in any order.
    """
    t = q.shape[1]
    blocks = -(-t // QUERY_BLOCK)
    pad = blocks * QUERY_BLOCK - t
    q = jnp.pad(q, ((0, 0), (0, pad), *[(0, 0)] * 3))
    q_positions = jnp.pad(q_positions, ((0, 0), (0, pad)), constant_values=-1)
    earlier = 0 if window is None else k.shape[1] - t
    reach = 0 if window is None else min(window - 1, t)

    def padded(a: Array, fill: int) -> Array:
        widths = [(0, 0), (reach, pad)] + [(0, 0)] * (a.ndim - 2)
        return jnp.pad(a[:, earlier:], widths, constant_values=fill)

    own = (padded(k, 0), padded(v, 0), padded(k_positions, -1))
    before = (k[:, :earlier], v[:, :earlier], k_positions[:, :earlier])

    def block(i: Int[Array, ""]) -> Array:
        start = i * QUERY_BLOCK
        queries = jax.lax.dynamic_slice_in_dim(q, start, QUERY_BLOCK, 1)
        at = jax.lax.dynamic_slice_in_dim(q_positions, start, QUERY_BLOCK, 1)
        if window is None:
            keys = own
        else:
            keys = tuple(
                jax.lax.dynamic_slice_in_dim(a, start, reach + QUERY_BLOCK, 1) for a in own
            )
        k_i, v_i, pos_i = (jnp.concatenate([a, b], 1) for a, b in zip(before, keys, strict=True))
        return attend(queries, k_i, v_i, at, pos_i, window=window, sink=sink)[0]

    out = jax.lax.map(block, jnp.arange(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :t]


class Attention(nnx.Module):
    """Self-attention of one decoder layer.

    The fused projection keeps the releases' chunked row order in memory: C chunks of
    [query heads | key heads | value heads].  Splitting its *output* gives heads in their natural
    order, so no weight (and no quantisation scale) is ever permuted (MODEL_SPEC 5.2).
    """

    def __init__(
        self,
        dim: int,
        layer: LayerSpec,
        value_scale: float | None,
        chunks: int,
        name: str,
        fmt: Format,
        make: Make,
    ):
        self.layer = layer
        self.value_scale = value_scale
        n, kv = layer.num_heads, layer.num_kv_heads
        rows = QKVRows(
            n * layer.head_dim // chunks,
            kv * layer.head_dim // chunks,
            kv * layer.v_head_dim // chunks,
        )
        self.rows = rows
        self.qkv_proj = declare(
            make,
            ParamSpec(
                f"{name}.qkv_proj.weight",
                (chunks, rows.total, dim),
                ("kv_heads", "qkv_row", "embed"),
                format=fmt,
                qkv=rows,
            ),
        )
        self.o_proj = declare_o_proj(make, name, dim, kv, n // kv, layer.v_head_dim)
        self.sink = declare_sink(make, name, kv, n // kv) if layer.sink else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        taps: Taps,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends over the cache (if any) and the tokens themselves; returns the updated cache."""
        q, k, v = self.project(x, positions)
        keys, values, key_positions, cache = self._with_cached(k, v, positions, cache)
        window, t = self.layer.window, x.shape[1]
        sink = None if self.sink is None else self.sink[...]
        tap = f"attention.{self.layer.index}"
        if t <= QUERY_BLOCK or taps.wants(tap):
            out, weights = attend(
                q, keys, values, positions, key_positions, window=window, sink=sink
            )
            if taps.wants(tap):
                by_head = (x.shape[0], self.layer.num_heads, *weights.shape[3:])
                taps.record(tap, reshard(weights, entries(x)[0]).reshape(by_head))
        else:
            out = attend_in_blocks(
                q, keys, values, positions, key_positions, window=window, sink=sink
            )
        out = out.astype(x.dtype).reshape(
            *out.shape[:3], -1, out_sharding=sharding(out, *entries(out)[:4])
        )
        y = contract("btkf,dkf->btd", out, self.o_proj[...].astype(x.dtype), like=x)
        return y.astype(x.dtype), cache

    def project(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K V"]]:
        """Rotated queries and keys, and scaled values, of T tokens.

        On a mesh they are split by KV head as the output projection is, and queries also by group:
        that is how fewer KV heads than devices are shared out.
        """
        layer, rows = self.layer, self.rows
        batch, (_, kv, group) = entries(x)[0], entries(self.o_proj[...])
        fused = linear(x, self.qkv_proj.get_value())
        fused = reshard(fused, batch, None, kv)  # whole rows, where groups are split
        split = jnp.split(fused, [rows.q, rows.q + rows.k], axis=-1)
        heads = (layer.num_kv_heads, layer.num_heads // layer.num_kv_heads)

        def by_head(y: Array, *shape: int) -> Array:
            placed = sharding(x, batch, None, kv, *[None] * (len(shape) - 1))
            return y.reshape(*x.shape[:2], *shape, out_sharding=placed)

        q = reshard(by_head(split[0], *heads, layer.head_dim), batch, None, kv, group)
        k = by_head(split[1], heads[0], layer.head_dim)
        v = by_head(split[2], heads[0], layer.v_head_dim)
        cos, sin = rotary_angles(positions, layer.rotary_dim, layer.rope_theta)
        if self.value_scale is not None:
            v = v * jnp.asarray(self.value_scale, v.dtype)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v

    def _with_cached(
        self,
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K V"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
    ) -> tuple[Array, Array, Int[Array, "B S"], LayerCache | None]:
        """Keys and values to attend over, their positions, and the cache with the new ones in."""
        if cache is None:
            return k, v, positions, None
        ring, slots, t = self.layer.window is not None, cache.k.shape[1], k.shape[1]
        written = kv_cache.write(cache, k, v, positions, ring=ring)
        if not ring or t <= min(slots - self.layer.window + 1, QUERY_BLOCK):
            at = slot_positions(positions.max(axis=1), slots, ring=ring)
            return written.k, written.v, at, written
        # So many new tokens overwrite ring slots that the first of them still have to see: attend
        # over the old ring and the new tokens side by side.
        first = jnp.where(positions >= 0, positions, jnp.iinfo(jnp.int32).max).min(axis=1)
        before = slot_positions(first - 1, slots, ring=True)
        keys = jnp.concatenate([cache.k, k.astype(cache.k.dtype)], axis=1)
        values = jnp.concatenate([cache.v, v.astype(cache.v.dtype)], axis=1)
        return keys, values, jnp.concatenate([before, positions], axis=1), written
