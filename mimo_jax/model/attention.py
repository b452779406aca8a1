"""Grouped-query attention with sliding windows and sinks (MODEL_SPEC 2.4 to 2.10)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import LayerSpec
from mimo_jax.model import cache as kv_cache
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.cached_attention import cached_attention
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
from pallas_kernels.backends import REFERENCE
from sharding.types import entries, reshard, sharding


class Attention(nnx.Module):
    """Self-attention of one decoder layer.

    The fused projection keeps the releases' chunked row order in memory: C chunks of
    [query heads | key heads | value heads].  Splitting its *output* gives heads in their natural
    order, so no weight (and no quantisation scale) is ever permuted (MODEL_SPEC 5.2).  `kernels`
    are the backends that it may use (`mimo_jax.model.packing`).
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
        self.kernels: tuple[str, ...] = (REFERENCE,)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        taps: Taps,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends over the cache (if any) and the tokens themselves; returns the updated cache."""
        q, k, v = self.project(x, positions)
        window, tap = self.layer.window, f"attention.{self.layer.index}"
        written = None
        if cache is not None:
            written = kv_cache.write(cache, k, v, positions, ring=window is not None)
        out, weights = cached_attention(
            q,
            k,
            v,
            positions,
            cache,
            written,
            None if self.sink is None else self.sink[...],
            window=window,
            kernels=self.kernels,
            with_weights=taps.wants(tap),
        )
        if weights is not None:
            by_head = (x.shape[0], self.layer.num_heads, *weights.shape[3:])
            taps.record(tap, reshard(weights, entries(x)[0]).reshape(by_head))
        out = out.reshape(*out.shape[:3], -1, out_sharding=sharding(out, *entries(out)[:4]))
        y = contract("btkf,dkf->btd", out, self.o_proj[...].astype(x.dtype), like=x)
        return y.astype(x.dtype), written

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
