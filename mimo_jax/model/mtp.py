"""The multi-token-prediction blocks (MODEL_SPEC 3)."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.backbone import release_formats
from mimo_jax.model.cache import LayerCache
from mimo_jax.model.layers import MLP, RMSNorm, joined_linear
from mimo_jax.model.parameters import Make, ParamSpec, declare
from mimo_jax.model.taps import Taps


class MTPBlock(nnx.Module):
    """One MTP block: two input norms, their projection, and a dense sliding-window layer."""

    def __init__(self, config: MiMoConfig, index: int, chunks: int, make: Make):
        name = f"model.mtp.layers.{index}"
        d, eps = config.hidden_size, config.layernorm_epsilon
        fmt, _ = release_formats(config)
        self.enorm = RMSNorm(d, eps, f"{name}.enorm", make)
        self.hnorm = RMSNorm(d, eps, f"{name}.hnorm", make)
        self.eh_proj = declare(
            make, ParamSpec(f"{name}.eh_proj.weight", (d, 2 * d), ("embed", "features"))
        )
        self.input_layernorm = RMSNorm(d, eps, f"{name}.input_layernorm", make)
        self.layer = config.layer_spec(index, "sliding", moe=False)
        self.self_attn = Attention(
            d, self.layer, config.attention_value_scale, chunks, f"{name}.self_attn", fmt, make
        )
        self.pre_mlp_layernorm = RMSNorm(d, eps, f"{name}.pre_mlp_layernorm", make)
        self.mlp = MLP(d, config.intermediate_size, f"{name}.mlp", fmt, make)
        self.final_layernorm = RMSNorm(d, eps, f"{name}.final_layernorm", make)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """What the backbone's head is given, and the block's updated cache.

        Args:
          hidden: the backbone's residual stream at rows j, before its final norm.
          embedded: embeddings of the tokens k + 1 positions after each row, in block k.
          positions: of the rows j, as in `MiMo`.
          cache: the block's own ring; None if these rows are all there is.
        """
        # The embedding comes first (MODEL_SPEC 3.3).
        both = jnp.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1)
        x = joined_linear(both, self.eh_proj[...], like=hidden)
        x, cache = self.self_attn(x, self.input_layernorm, positions, cache, Taps())
        x = x + self.mlp(self.pre_mlp_layernorm(x))
        return self.final_layernorm(x), cache


class MTP(nnx.Module):
    """The MTP blocks of a checkpoint; embedding and head are the backbone's."""

    def __init__(self, config: MiMoConfig, blocks: int, make: Make, qkv_chunks: int | None = None):
        chunks = config.qkv_chunks if qkv_chunks is None else qkv_chunks
        self.layers = nnx.List([MTPBlock(config, i, chunks, make) for i in range(blocks)])
