"""Parameters of the multi-token-prediction blocks (MODEL_SPEC 3.2)."""

from __future__ import annotations

from flax import nnx

from mimo_jax.config import MiMoConfig
from mimo_jax.model.attention import Attention
from mimo_jax.model.backbone import release_formats
from mimo_jax.model.layers import MLP, RMSNorm
from mimo_jax.model.parameters import Make, ParamSpec, declare


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
        layer = config.layer_spec(index, "sliding", moe=False)
        self.self_attn = Attention(
            d, layer, config.attention_value_scale, chunks, f"{name}.self_attn", fmt, make
        )
        self.pre_mlp_layernorm = RMSNorm(d, eps, f"{name}.pre_mlp_layernorm", make)
        self.mlp = MLP(d, config.intermediate_size, f"{name}.mlp", fmt, make)
        self.final_layernorm = RMSNorm(d, eps, f"{name}.final_layernorm", make)


class MTP(nnx.Module):
    """The MTP blocks of a checkpoint; embedding and head are the backbone's."""

    def __init__(self, config: MiMoConfig, blocks: int, make: Make, qkv_chunks: int | None = None):
        chunks = config.qkv_chunks if qkv_chunks is None else qkv_chunks
        self.layers = nnx.List([MTPBlock(config, i, chunks, make) for i in range(blocks)])
