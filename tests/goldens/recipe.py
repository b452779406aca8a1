"""Seeded configurations, weights and inputs behind the golden files of this folder.

Numpy and the standard library only, so that the same numbers come out in the torch environment that
writes the goldens (`scripts/make_goldens.py`) and in the tests that read them. No weight is stored:
a golden holds the logits and a fingerprint of the weights they belong to.

Conventions
- `Case.config` has the keys of the hub's config.json (MODEL_SPEC 1.1). `sliding_window` is the
  number of keys a query sees **including its own** (MODEL_SPEC 2.8), never the number before it.
- `make_weights` uses the hub's tensor names (MODEL_SPEC 5.1, split projection layout).
- Draws depend on (seed, tensor name) alone: cases that share a seed and a shape share values.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

FULL, SLIDING = 0, 1

BASE_CONFIG: dict[str, Any] = {
    "architectures": ["MiMoV2FlashForCausalLM"],
    "model_type": "mimo_v2_flash",
    "vocab_size": 112,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 8,
    "swa_num_key_value_heads": 4,
    "head_dim": 48,
    "v_head_dim": 32,
    "swa_head_dim": 48,
    "swa_v_head_dim": 32,
    "partial_rotary_factor": 0.334,
    "rope_theta": 5000000,
    "swa_rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 512,
    "hybrid_layer_pattern": [FULL, SLIDING, SLIDING],
    "hybrid_block_size": None,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_value_scale": 0.707,
    "layernorm_epsilon": 1e-05,
    "hidden_act": "silu",
    "moe_layer_freq": [0, 1, 1],
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": None,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "use_cache": True,
    "dtype": "bfloat16",
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# A matrix has the standard deviation gain / sqrt(fan_in), the embedding 1. The query and key gains
# give scores a spread of about 2, so that attention is far from uniform; the head's gain puts the
# logits between 1 and 10.
GAINS = {"q_proj": 1.5, "k_proj": 1.5, "gate": 1.5, "lm_head": 3.0, "embed_tokens": None}


@dataclass(frozen=True)
class Case:
    """One golden: what to build, what to feed it and what to keep of its logits.

    Attributes:
        covers: what this case is there to catch.
        config: hub-style config.json keys.
        seed: seed of the weights and of the tokens.
        lengths: number of real tokens of each row; shorter rows are padded to the longest.
        padding: "right" or "left": the side on which shorter rows are padded.
        steps: lengths of consecutive forwards through one KV cache (the first is the prefill);
            empty when the case has no cached run. They may stop short of the longest row.
        keep: columns whose logits of the parallel run are stored; empty for all of them.
        sink_std: standard deviation of the sinks, where `sink_range` is None.
        sink_range: (low, high) of the sinks' absolute values; the sign is random.
        sink_spike: value of head 0's sink in every sliding layer, where given.
        bias_std: standard deviation of `e_score_correction_bias`.
    """

    covers: str
    config: dict[str, Any]
    seed: int
    lengths: tuple[int, ...]
    padding: str = "right"
    steps: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    sink_std: float = 2.0
    sink_range: tuple[float, float] | None = None
    sink_spike: float | None = None
    bias_std: float = 0.05


def make_config(**changes: Any) -> dict[str, Any]:
    """BASE_CONFIG with `changes`; keys that the hub stores twice are kept equal to each other."""
    unknown = sorted(set(changes) - set(BASE_CONFIG))
    if unknown:
        raise KeyError(f"{unknown} are not keys of BASE_CONFIG: add them there first")
    config = {**BASE_CONFIG, **changes}
    config["swa_num_attention_heads"] = config["num_attention_heads"]
    config["swa_head_dim"] = config["head_dim"]
    config["swa_v_head_dim"] = config["v_head_dim"]
    config["sliding_window_size"] = config["attention_chunk_size"] = config["sliding_window"]
    config["num_hidden_layers"] = len(config["hybrid_layer_pattern"])
    if len(config["moe_layer_freq"]) != config["num_hidden_layers"]:
        raise ValueError("moe_layer_freq and hybrid_layer_pattern must name the same layers")
    return config


_FLASH = make_config(
    hybrid_layer_pattern=[FULL, SLIDING, SLIDING, SLIDING, SLIDING, FULL],
    moe_layer_freq=[0, 1, 1, 1, 1, 1],
)
_PRO = make_config(
    hybrid_layer_pattern=[FULL, SLIDING, SLIDING, SLIDING, FULL],
    moe_layer_freq=[0, 1, 1, 1, 1],
    num_key_value_heads=2,
    swa_num_key_value_heads=2,
    rope_theta=10000000,
    attention_value_scale=0.612,
    n_routed_experts=48,
    num_experts_per_tok=8,
    moe_intermediate_size=16,
)
_LONG = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "swa_num_key_value_heads": 2,
    "head_dim": 24,
    "v_head_dim": 16,
    "vocab_size": 96,
    "intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
_LONG_STEPS = (120, 8, 1, 1, 1, 3, 8, 1)
_LONG_KEEP = (0, 1, 64, *range(124, 144), 200, *range(254, 262), *range(292, 300))

CASES: dict[str, Case] = {
    "unit_test": Case(
        covers="the shape of transformers' own unit test: equal q/k and v head dims, half rotary, "
        "two layers, visible window of 64, vocabulary of 99",
        config=make_config(
            vocab_size=99,
            hidden_size=32,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            swa_num_key_value_heads=4,
            head_dim=8,
            v_head_dim=8,
            partial_rotary_factor=0.5,
            hybrid_layer_pattern=[FULL, SLIDING],
            moe_layer_freq=[0, 1],
            moe_intermediate_size=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            routed_scaling_factor=1.0,
            sliding_window=64,
        ),
        seed=101,
        lengths=(150,),
        steps=(60, 1, 1, 1, 3, 8, 1),
        keep=(*range(0, 8), *range(58, 82), *range(126, 150)),
    ),
    "flash": Case(
        covers="V2-Flash in small: different full and sliding kv heads, q/k head dim 48 and v 32, "
        "rotary factor 0.334 (16 dims), two thetas, 0.707, dense first layer, seven windows",
        config=_FLASH,
        seed=102,
        lengths=(60, 60),
        steps=(37, 1, 1, 1, 3, 8, 1, 8),
    ),
    "pro": Case(
        covers="Pro in small: equal full and sliding kv heads, 0.612, theta 1e7, 48 experts top-8",
        config=_PRO,
        seed=103,
        lengths=(56, 56),
        steps=(29, 1, 1, 1, 3, 8, 1),
    ),
    "release_heads": Case(
        covers="the release's head sizes: q/k 192, v 128, rotary 64 of 192 dims; epsilon 1e-6",
        config=make_config(
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=1,
            swa_num_key_value_heads=2,
            head_dim=192,
            v_head_dim=128,
            vocab_size=100,
            layernorm_epsilon=1e-6,
            sliding_window=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
        ),
        seed=104,
        lengths=(52,),
        steps=(33, 1, 1, 1, 3, 8),
    ),
    "window_128": Case(
        covers="a query sees 128 keys, its own included (MODEL_SPEC 2.8); cached steps cross the "
        "edge of the window",
        config=make_config(**_LONG, sliding_window=128),
        seed=105,
        lengths=(300,),
        steps=_LONG_STEPS,
        keep=_LONG_KEEP,
    ),
    "window_129": Case(
        covers="the weights and tokens of window_128 with one more visible key (SGLang's reading)",
        config=make_config(**_LONG, sliding_window=129),
        seed=105,
        lengths=(300,),
        steps=_LONG_STEPS,
        keep=_LONG_KEEP,
    ),
    "large_sinks": Case(
        covers="sinks of +-5 to +-30, head 0 at +30: the sink decides the softmax's maximum",
        config=make_config(hybrid_layer_pattern=[SLIDING, FULL, SLIDING], moe_layer_freq=[0, 0, 1]),
        seed=106,
        lengths=(40, 40),
        steps=(21, 1, 1, 1, 3, 8),
        sink_range=(5.0, 30.0),
        sink_spike=30.0,
    ),
    "selection_bias": Case(
        covers="a selection bias that changes the chosen experts but not their weights; every "
        "layer MoE; routed_scaling_factor 2.5",
        config=make_config(
            hybrid_layer_pattern=[FULL, SLIDING, SLIDING, FULL],
            moe_layer_freq=[1, 1, 1, 1],
            routed_scaling_factor=2.5,
        ),
        seed=107,
        lengths=(40, 40),
        bias_std=0.4,
    ),
    "dense": Case(
        covers="no MoE layer, no value scale (null), a sliding first layer, rotary of all dims",
        config=make_config(
            hybrid_layer_pattern=[SLIDING, FULL, SLIDING],
            moe_layer_freq=[0, 0, 0],
            attention_value_scale=None,
            partial_rotary_factor=1.0,
        ),
        seed=108,
        lengths=(40, 40),
        steps=(17, 1, 1, 1, 3, 8),
    ),
    "full_only": Case(
        covers="no sliding layer: no sink anywhere, one theta in use",
        config=make_config(
            hybrid_layer_pattern=[FULL, FULL], moe_layer_freq=[0, 1], attention_value_scale=0.612
        ),
        seed=109,
        lengths=(40,),
    ),
    "ragged_right": Case(
        covers="rows of 41, 23, 9 and 1 tokens padded on the right; positions from the mask",
        config=_FLASH,
        seed=110,
        lengths=(41, 23, 9, 1),
        padding="right",
    ),
    "ragged_left": Case(
        covers="the rows of ragged_right padded on the left, and cached steps over them",
        config=_FLASH,
        seed=110,
        lengths=(41, 23, 9, 1),
        padding="left",
        steps=(28, 1, 1, 3, 8),
    ),
    "transformers_checkpoint": Case(
        covers="the model that the two folders written by transformers' save_pretrained hold",
        config=make_config(
            vocab_size=96,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=1,
            swa_num_key_value_heads=2,
            head_dim=24,
            v_head_dim=16,
            hybrid_layer_pattern=[FULL, SLIDING, FULL],
            moe_layer_freq=[0, 1, 1],
            moe_intermediate_size=16,
            n_routed_experts=6,
            num_experts_per_tok=2,
        ),
        seed=111,
        lengths=(32,),
    ),
}


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Hub tensor names and shapes of a split-layout checkpoint without MTP (MODEL_SPEC 5.1)."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim, v_head_dim = config["head_dim"], config["v_head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }

    def add_mlp(prefix: str, intermediate: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.up_proj.weight"] = (intermediate, hidden)
        shapes[f"{prefix}.down_proj.weight"] = (hidden, intermediate)

    for index, (pattern, is_moe) in enumerate(
        zip(config["hybrid_layer_pattern"], config["moe_layer_freq"], strict=True)
    ):
        layer = f"model.layers.{index}"
        sliding = pattern == SLIDING
        kv_heads = config["swa_num_key_value_heads" if sliding else "num_key_value_heads"]
        shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * head_dim, hidden)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_heads * head_dim, hidden)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_heads * v_head_dim, hidden)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * v_head_dim)
        if sliding:
            shapes[f"{layer}.self_attn.attention_sink_bias"] = (heads,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
        if is_moe:
            shapes[f"{layer}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
            for expert in range(config["n_routed_experts"]):
                add_mlp(f"{layer}.mlp.experts.{expert}", config["moe_intermediate_size"])
        else:
            add_mlp(f"{layer}.mlp", config["intermediate_size"])
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def make_weights(case: Case) -> dict[str, np.ndarray]:
    """All tensors of `case` in float32 under their hub names."""
    return {
        name: _make_tensor(case, name, shape).astype(np.float32)
        for name, shape in tensor_shapes(case.config).items()
    }


def make_inputs(case: Case) -> dict[str, np.ndarray]:
    """Token ids and mask of `case`, and the positions that follow from the mask.

    Returns:
        tokens: int32 [B, T], T the longest row; padding holds `pad_token_id`.
        mask: int8 [B, T], 1 at real tokens.
        positions: int32 [B, T], number of real tokens before this one; 0 at padding in front.
    """
    batch, width = len(case.lengths), max(case.lengths)
    tokens = np.full((batch, width), case.config["pad_token_id"], np.int32)
    mask = np.zeros((batch, width), np.int8)
    for row, length in enumerate(case.lengths):
        where = slice(0, length) if case.padding == "right" else slice(width - length, width)
        rng = _generator(case.seed, f"tokens.{row}")
        tokens[row, where] = rng.integers(3, case.config["vocab_size"], length)
        mask[row, where] = 1
    positions = np.maximum(np.cumsum(mask, axis=1, dtype=np.int32) - 1, 0).astype(np.int32)
    return {"tokens": tokens, "mask": mask, "positions": positions}


def fingerprint(weights: dict[str, np.ndarray]) -> int:
    """CRC-32 over names and bytes, in the order of the names.

    A golden stores it, so that a numpy whose random streams have moved is told apart from a model
    that computes something else.
    """
    crc = 0
    for name in sorted(weights):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(weights[name]).tobytes(), crc)
    return crc


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=(seed << 32) | zlib.crc32(name.encode())))


def _make_tensor(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = _generator(case.seed, name)
    if name.endswith("attention_sink_bias"):
        return _make_sinks(case, rng, shape)
    if name.endswith("e_score_correction_bias"):
        return case.bias_std * rng.standard_normal(shape)
    if len(shape) == 1:
        return 1.0 + rng.uniform(-0.2, 0.2, shape)
    gain = GAINS.get(name.split(".")[-2], 1.0)
    scale = 1.0 if gain is None else gain / np.sqrt(shape[-1])
    return scale * rng.standard_normal(shape)


def _make_sinks(case: Case, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if case.sink_range is None:
        sinks = case.sink_std * rng.standard_normal(shape)
    else:
        sinks = rng.uniform(*case.sink_range, shape) * rng.choice([-1.0, 1.0], shape)
    if case.sink_spike is not None:
        sinks[0] = case.sink_spike
    return sinks
