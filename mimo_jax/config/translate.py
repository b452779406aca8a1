"""The ways a backbone's config.json can be written, brought to one (MODEL_SPEC 1.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mimo_jax.config.reading import ConfigError, refuse


def is_transformers_native(raw: Mapping[str, Any]) -> bool:
    """Whether transformers 5's own class wrote this config."""
    return "layer_types" in raw and "hybrid_layer_pattern" not in raw


def from_transformers(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translates what transformers 5's MiMoV2FlashConfig saves to the released spelling.

    That class has twice as many key/value heads in sliding layers and always a sink there, and its
    `sliding_window` counts the query itself.
    """
    for key in ("layer_types", "mlp_layer_types"):
        if not isinstance(raw.get(key) or [], list):
            raise ConfigError(f"{key}={raw[key]!r} must be a list of names, one a layer")
    for key in ("num_key_value_heads", "v_head_dim"):
        if raw.get(key) is None:
            raise ConfigError(
                f"config.json has layer_types but no {key!r}: transformers writes both"
            )
    d = dict(raw)
    d["hybrid_layer_pattern"] = [int(t == "sliding_attention") for t in d.pop("layer_types")]
    mlp = d.pop("mlp_layer_types", None) or ["dense"] + ["sparse"] * (len(raw["layer_types"]) - 1)
    d["moe_layer_freq"] = [int(t == "sparse") for t in mlp]
    rope = d.pop("rope_parameters", None) or {}
    full, sliding = rope.get("full_attention", {}), rope.get("sliding_attention", {})
    factors = {r.get("partial_rotary_factor", 0.334) for r in (full, sliding)}
    kinds = {r.get("rope_type", "default") for r in (full, sliding)}
    if len(factors) > 1 or kinds != {"default"}:
        raise ConfigError(f"rope_parameters {rope} need one rotary width and rope_type 'default'")
    d["partial_rotary_factor"] = factors.pop()
    d["rope_theta"] = full.get("rope_theta", 5_000_000.0)
    d["swa_rope_theta"] = sliding.get("rope_theta", 10_000.0)
    d["layernorm_epsilon"] = d.pop("rms_norm_eps", 1e-5)
    d["swa_num_key_value_heads"] = 2 * d["num_key_value_heads"]
    d["swa_v_head_dim"] = d["v_head_dim"]
    d["add_swa_attention_sink_bias"] = True
    d.setdefault("sliding_window", 129)
    return d


def refuse_unsupported(d: Mapping[str, Any]) -> None:
    """Refuses what the model code does not implement.

    Raises:
      ConfigError: names the key, the value and what is supported.
    """
    if d.get("model_type") not in ("mimo_v2", "mimo_v2_flash", "", None):
        raise ConfigError(
            f"model_type {d['model_type']!r} is not a MiMo-V2 model (mimo_v2, mimo_v2_flash)"
        )
    refuse(
        d,
        "the MiMo-V2 backbone",
        scoring_func=("sigmoid", None),
        topk_method=("noaux_tc", None),
        n_group=(1, None),
        topk_group=(1, None),
        n_shared_experts=(0, None),
        attention_bias=(False, None),
        hidden_act=("silu", None),
        tie_word_embeddings=(False, None),
        attention_projection_layout=("split", "fused_qkv", None),
        dtype=("bfloat16", "float32", None),
    )
    for key in ("rope_scaling", "rope_parameters"):
        scaling = d.get(key) or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind != "default":
            raise ConfigError(f"{key} of type {kind!r} is not supported; MiMo-V2 uses none")
    quant = d.get("quantization_config")
    if quant is not None:
        refuse(
            quant,
            "quantization_config",
            quant_method=("fp8",),
            fmt=("e4m3", None),
            store_dtype=("mxfp4", None),
            mxfp4_block_size=(32, None),
        )
        if list(quant.get("weight_block_size") or [128, 128]) != [128, 128]:
            raise ConfigError(
                f"quantization_config: weight_block_size={quant['weight_block_size']} is not "
                "supported (supported: [128, 128])"
            )


def layer_pattern(d: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """A 1 for each sliding layer; all full where the config says nothing."""
    if d.get("hybrid_layer_pattern") is not None:
        return tuple(int(bool(x)) for x in d["hybrid_layer_pattern"])
    period = d.get("hybrid_block_size")
    if not period:
        return (0,) * n_layers
    if not isinstance(period, int) or period < 1:
        raise ConfigError(f"hybrid_block_size={period!r} must be a positive number of layers")
    return tuple(int((i + 1) % period != 0) for i in range(n_layers))


def moe_pattern(d: Mapping[str, Any], n_layers: int) -> tuple[int, ...]:
    """A 1 for each mixture-of-experts layer; all dense where the config says nothing."""
    freq = d.get("moe_layer_freq")
    if freq is None:
        return (0,) * n_layers
    if isinstance(freq, int):
        if freq < 1:
            raise ConfigError(f"moe_layer_freq={freq} must be a positive period or a list")
        return tuple(int(i % freq == 0) for i in range(n_layers))
    return tuple(int(bool(x)) for x in freq)
