"""Grouped-query attention with sliding windows and sinks (MODEL_SPEC 2.4 to 2.10)."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import LayerSpec
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.cached_attention import cached_attention
from mimo_jax.model.layers import (
    RMSNorm,
    declare_o_proj,
    declare_sink,
    linear,
    output_projection,
)
from mimo_jax.model.parameters import Format, Make, ParamSpec, QKVRows, declare
from mimo_jax.model.taps import Taps
from pallas_kernels.all_reduce.exchange import Exchange
from pallas_kernels.backends import REFERENCE
from pallas_kernels.rotate_and_store import Heads
from sharding.types import entries, reshard


class Attention(nnx.Module):
    """Self-attention of one decoder layer.

    The fused projection keeps the releases' chunked row order in memory: C chunks of
    [query heads | key heads | value heads].  Splitting its *output* gives heads in their natural
    order, so no weight (and no quantisation scale) is ever permuted.  `kernels` are the
    backends that it may use (`mimo_jax.model.packing`).
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
        n, kv = layer.num_heads, layer.num_kv_heads
        self.heads = Heads(
            kv // chunks,
            n // kv,
            layer.head_dim,
            layer.v_head_dim,
            layer.rotary_dim,
            layer.rope_theta,
            value_scale,
        )
        rows = QKVRows(*self.heads.rows)
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
        norm: RMSNorm,
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        taps: Taps,
        exchange: Exchange | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """Attends over the cache (if any) and the tokens themselves.

        Args:
          x: the residual stream.
          norm: what it goes through first.
          positions, cache, taps: as in `MiMo`.
          exchange: what devices of a mesh may add up through.

        Returns:
          The residual stream with the attention added, and the updated cache.
        """
        tap = f"attention.{self.layer.index}"
        out, cache, weights = cached_attention(
            self.projected(norm(x)),
            positions,
            cache,
            None if self.sink is None else self.sink[...],
            heads=self.heads,
            window=self.layer.window,
            group=entries(self.o_proj[...])[2],
            kernels=self.kernels,
            with_weights=taps.wants(tap),
        )
        if weights is not None:
            by_head = (x.shape[0], self.layer.num_heads, *weights.shape[3:])
            taps.record(tap, reshard(weights, entries(x)[0]).reshape(by_head))
        w = self.o_proj[...]
        return output_projection(out, w, x, kernels=self.kernels, exchange=exchange), cache

    def projected(self, x: Float[Array, "B T D"]) -> Float[Array, "B T C R"]:
        """Queries, keys and values of T tokens, as they lie in the weights' rows.

        On a mesh they are split by KV head as the output projection is; rows are whole, also where
        query heads are shared out by group because there are fewer KV heads than devices.
        """
        fused = linear(x, self.qkv_proj.get_value())
        return reshard(fused, entries(x)[0], None, entries(self.o_proj[...])[1])
