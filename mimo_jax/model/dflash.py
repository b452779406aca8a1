"""The DFlash drafter (MODEL_SPEC 4)."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import DFlashConfig
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.cached_attention import cached_attention, store_context
from mimo_jax.model.layers import (
    MLP,
    RMSNorm,
    contract,
    declare_o_proj,
    declare_sink,
    joined_linear,
    output_projection,
)
from mimo_jax.model.parameters import Make, ParamSpec, declare
from pallas_kernels.backends import REFERENCE
from pallas_kernels.rotate_and_store import Heads
from sharding.types import entries, reshard


class DFlashAttention(nnx.Module):
    """Attention of one drafter layer: a block that sees itself whole, and a window of context."""

    def __init__(self, config: DFlashConfig, name: str, make: Make):
        d, eps = config.hidden_size, config.rms_norm_eps
        n, k = config.num_attention_heads, config.num_key_value_heads
        h, v = config.head_dim, config.v_head_dim
        self.window = config.sliding_window
        self.heads = Heads(
            1, n // k, h, v, config.rotary_dim, config.rope_theta, config.attention_value_scale
        )

        def projection(which: str, group: int, width: int) -> nnx.Param:
            axes = ("kv_heads", "group" if group > 1 else None, "embed")
            spec = ParamSpec(
                f"{name}.{which}.weight",
                (k, group * width, d),
                axes,
                stored_shape=(k * group * width, d),
            )
            return declare(make, spec)

        self.q_proj = projection("q_proj", n // k, h)
        self.k_proj = projection("k_proj", 1, h)
        self.v_proj = projection("v_proj", 1, v)
        self.o_proj = declare_o_proj(make, name, d, k, n // k, v)
        self.q_norm = RMSNorm(h, eps, f"{name}.q_norm", make)
        self.k_norm = RMSNorm(h, eps, f"{name}.k_norm", make)
        self.sink = declare_sink(make, name, k, n // k) if config.attention_sink_bias else None
        self.kernels: tuple[str, ...] = (REFERENCE,)

    def keys_and_values(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K V"]]:
        """Normalised keys and values, neither rotated nor scaled yet."""
        k, v = (_projected(x, p) for p in (self.k_proj, self.v_proj))
        return self.k_norm(k), v

    def projected(self, x: Float[Array, "B T D"]) -> Float[Array, "B T K R"]:
        """A block's queries, keys and values by KV head, normalised and not rotated yet."""
        q = _projected(x, self.q_proj)
        by_head = (*q.shape[:3], self.heads.group, self.heads.head)
        q = self.q_norm(reshard(q, *entries(q)[:3], None).reshape(by_head))
        return jnp.concatenate([q.reshape(*q.shape[:3], -1), *self.keys_and_values(x)], axis=-1)

    def commit(
        self, context: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: LayerCache
    ) -> LayerCache:
        """The ring with the keys and values of context features, straight from the projections."""
        return store_context(*self.keys_and_values(context), positions, cache, self.heads)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        norm: RMSNorm,
        positions: Int[Array, "B T"],
        cache: LayerCache,
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """The residual stream with the attention over context and block added.

        The block's keys and values are left in the ring, at positions that are not committed yet.
        """
        out, cache_after, _ = cached_attention(
            self.projected(norm(x)),
            positions,
            cache,
            None if self.sink is None else self.sink[...],
            heads=self.heads,
            window=self.window,
            group=entries(self.o_proj[...])[2],
            kernels=self.kernels,
            causal=False,
        )
        assert cache_after is not None
        return output_projection(out, self.o_proj[...], x, kernels=self.kernels), cache_after


def _projected(x: Float[Array, "B T D"], w: nnx.Param) -> Float[Array, "B T K R"]:
    return contract("btd,krd->btkr", x, w[...].astype(x.dtype)).astype(x.dtype)


class DFlashLayer(nnx.Module):
    """One drafter layer."""

    def __init__(self, config: DFlashConfig, index: int, make: Make):
        name = f"layers.{index}"
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps, f"{name}.input_layernorm", make)
        self.self_attn = DFlashAttention(config, f"{name}.self_attn", make)
        self.post_attention_layernorm = RMSNorm(d, eps, f"{name}.post_attention_layernorm", make)
        self.mlp = MLP(d, config.intermediate_size, f"{name}.mlp", "plain", make)

    def __call__(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], cache: LayerCache
    ) -> tuple[Float[Array, "B T D"], LayerCache]:
        """One layer over a block."""
        x, cache = self.self_attn(x, self.input_layernorm, positions, cache)
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class DFlash(nnx.Module):
    """The drafter's own parameters; embedding and head are the backbone's.

    `mask_embedding` is the vector that stands for masked positions.  It ships outside the
    safetensors file, as `mask_embedding.pt`, hence its name here.
    """

    def __init__(self, config: DFlashConfig, make: Make):
        d, eps = config.hidden_size, config.rms_norm_eps
        taps = len(config.target_layer_ids)
        self.config = config
        self.fc = declare(make, ParamSpec("fc.weight", (d, taps * d), ("embed", "features")))
        self.hidden_norm = RMSNorm(d, eps, "hidden_norm", make)
        self.layers = nnx.List(
            [DFlashLayer(config, i, make) for i in range(config.num_hidden_layers)]
        )
        self.norm = RMSNorm(d, eps, "norm", make)
        self.mask_embedding = declare(make, ParamSpec("mask_embedding.pt", (d,), ("embed",)))

    def features(self, taps: Sequence[Float[Array, "B T D"]]) -> Float[Array, "B T D"]:
        """Context features of the backbone's residual streams after the target layers."""
        joined = jnp.concatenate(taps, axis=-1)
        return self.hidden_norm(joined_linear(joined, self.fc[...], like=taps[0]))

    def commit(
        self,
        features: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        caches: Sequence[LayerCache],
    ) -> tuple[LayerCache, ...]:
        """The layers' rings with the context features of more positions."""
        return tuple(
            layer.self_attn.commit(features, positions, cache)
            for layer, cache in zip(self.layers, caches, strict=True)
        )

    def __call__(
        self,
        anchor: Float[Array, "B D"],
        positions: Int[Array, " B"],
        caches: Sequence[LayerCache],
    ) -> tuple[Float[Array, "B block D"], tuple[LayerCache, ...]]:
        """What the backbone's head is given: row r is of the token r positions after the anchor.

        Args:
          anchor: embeddings of each row's newest token.
          positions: its position; negative for rows that are done.
          caches: rings with the features of all positions before it.
        """
        block = self.config.block_size
        mask = self.mask_embedding[...].astype(anchor.dtype)
        offset = jnp.arange(block, dtype=positions.dtype)
        x = jnp.where(offset[:, None] == 0, anchor[:, None], mask)
        at = jnp.where(positions[:, None] < 0, -1, positions[:, None] + offset)
        after = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer(x, at, cache)
            after.append(cache)
        return self.norm(x), tuple(after)
