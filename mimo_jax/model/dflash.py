"""Parameters of the DFlash drafter (MODEL_SPEC 4.3)."""

from __future__ import annotations

from flax import nnx

from mimo_jax.config import DFlashConfig
from mimo_jax.model.layers import MLP, RMSNorm, declare_o_proj, declare_sink
from mimo_jax.model.parameters import Make, ParamSpec, declare


class DFlashAttention(nnx.Module):
    """Projections, per-head norms and sinks of one drafter layer."""

    def __init__(self, config: DFlashConfig, name: str, make: Make):
        d, eps = config.hidden_size, config.rms_norm_eps
        n, k = config.num_attention_heads, config.num_key_value_heads
        h, v = config.head_dim, config.v_head_dim

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


class DFlashLayer(nnx.Module):
    """One drafter layer."""

    def __init__(self, config: DFlashConfig, index: int, make: Make):
        name = f"layers.{index}"
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(d, eps, f"{name}.input_layernorm", make)
        self.self_attn = DFlashAttention(config, f"{name}.self_attn", make)
        self.post_attention_layernorm = RMSNorm(d, eps, f"{name}.post_attention_layernorm", make)
        self.mlp = MLP(d, config.intermediate_size, f"{name}.mlp", "plain", make)


class DFlash(nnx.Module):
    """The drafter's own parameters; embedding and head are the backbone's.

    `mask_embedding` is the vector that stands for masked positions.  It ships outside the
    safetensors file, as `mask_embedding.pt` (MODEL_SPEC 4.2.5), hence its name here.
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
