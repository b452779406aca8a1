"""The MiMo-V2 decoder stack and the pure step every decoding loop is built on (MODEL_SPEC 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import LayerSpec, MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.cache import KVCache, LayerCache
from mimo_jax.model.layers import MLP, RMSNorm, contract
from mimo_jax.model.moe import MoE
from mimo_jax.model.parameters import Format, Make, ParamSpec, declare
from mimo_jax.model.taps import Taps
from pallas_kernels.all_reduce.exchange import Exchange
from sharding.types import entries, sharding


def release_formats(config: MiMoConfig) -> tuple[Format, Format]:
    """Storage formats (of linear weights, of expert weights) that the config announces."""
    if config.quantization_config is None:
        return "plain", "plain"
    mxfp4 = '"store_dtype": "mxfp4"' in config.quantization_config
    return "fp8", "mxfp4" if mxfp4 else "fp8"


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual."""

    def __init__(self, config: MiMoConfig, layer: LayerSpec, chunks: int, make: Make):
        name = f"model.layers.{layer.index}"
        linear_format, expert_format = release_formats(config)
        d, eps = config.hidden_size, config.layernorm_epsilon
        self.index = layer.index
        self.input_layernorm = RMSNorm(d, eps, f"{name}.input_layernorm", make)
        self.self_attn = Attention(
            d,
            layer,
            config.attention_value_scale,
            chunks,
            f"{name}.self_attn",
            linear_format,
            make,
        )
        self.post_attention_layernorm = RMSNorm(d, eps, f"{name}.post_attention_layernorm", make)
        self.mlp = (
            MoE(config, layer.index, f"{name}.mlp", expert_format, make)
            if layer.moe
            else MLP(d, config.intermediate_size, f"{name}.mlp", linear_format, make)
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
        taps: Taps,
        exchange: Exchange | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        """One layer; returns the residual stream and the layer's updated cache."""
        with jax.named_scope("attention"):
            norm = self.input_layernorm
            x, cache = self.self_attn(x, norm, positions, cache, taps, exchange)
        with jax.named_scope("mlp"):
            norm = self.post_attention_layernorm
            if isinstance(self.mlp, MoE):
                x = self.mlp(x, norm, taps, exchange)
            else:
                x = x + self.mlp(norm(x))
        taps.record(f"hidden.{self.index}", x)
        return x, cache


class MiMo(nnx.Module):
    """The backbone: embedding, decoder layers, final norm and head.

    `make` decides what the parameters hold (see `mimo_jax.model.parameters`).  `qkv_chunks` is the
    number of chunks in which the fused QKV rows are interleaved; the config's by default.
    `exchange` is what the devices of a mesh may add up through (`mimo_jax.model.packing`).
    """

    def __init__(self, config: MiMoConfig, make: Make, qkv_chunks: int | None = None):
        chunks = config.qkv_chunks if qkv_chunks is None else qkv_chunks
        vocab, d = config.vocab_size, config.hidden_size
        self.config = config
        self.embed_tokens = declare(
            make, ParamSpec("model.embed_tokens.weight", (vocab, d), (None, "features"))
        )
        self.layers = nnx.List([DecoderLayer(config, s, chunks, make) for s in config.layers])
        self.norm = RMSNorm(d, config.layernorm_epsilon, "model.norm", make)
        self.lm_head = declare(make, ParamSpec("lm_head.weight", (vocab, d), ("vocab", "embed")))
        self.exchange: Exchange | None = nnx.data(None)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        *,
        taps: Sequence[str] = (),
    ) -> Any:
        """The pure step: logits of T tokens a sequence, given what the cache holds.

        Args:
          tokens: token ids.
          positions: absolute positions, increasing by one along a row; negative for padding,
            which is neither attended to nor cached.  0..T-1 by default.
          cache: keys and values of earlier positions; without it, the T tokens are all there is.
          taps: names of optional outputs (`mimo_jax.model.taps`).

        Returns:
          (logits float32 [B, T, vocab], updated cache or None), and with `taps` a third item: a
          dictionary of arrays.  Nothing in the model or the cache passed in is changed.

        Raises:
          ValueError: a tap is unknown.
        """
        hidden, cache, tapped = self.hidden_states(tokens, positions, cache, taps=taps)
        logits = self.logits(hidden)
        return (logits, cache, tapped) if taps else (logits, cache)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        cache: KVCache | None = None,
        *,
        taps: Sequence[str] = (),
    ) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Array]]:
        """The residual stream after the last layer, before the final norm; as `__call__` else."""
        if positions is None:
            row = jnp.arange(tokens.shape[1])
            placed = sharding(tokens, *entries(tokens))
            positions = jnp.broadcast_to(row, tokens.shape, out_sharding=placed)
        collected = Taps(taps)
        x = self.embed(tokens)
        caches = []
        for i, layer in enumerate(self.layers):
            with jax.named_scope(f"layer{i}"):
                held = None if cache is None else cache.layers[i]
                x, layer_cache = layer(x, positions, held, collected, self.exchange)
            caches.append(layer_cache)
        if cache is not None:
            cache = KVCache(tuple(caches), cache.max_len, cache.slack)
        return x, cache, collected.result()

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """What enters the first layer."""
        with jax.named_scope("embed"):
            table = self.embed_tokens[...]
            x = table.at[tokens].get(out_sharding=sharding(table, entries(tokens)[0]))
            return x.astype(jnp.dtype(self.config.dtype))

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b vocab"]:
        """Final norm and head, float32, of the residual stream."""
        with jax.named_scope("head"):
            return self.head(self.norm(hidden))

    def head(self, h: Float[Array, "*b D"]) -> Float[Array, "*b vocab"]:
        """float32 logits of what a norm has given."""
        return contract("...d,vd->...v", h, self.lm_head[...].astype(h.dtype))
