"""The weights of drafters in training: sizes, initial values, rounding, optimisers and saving.

Masters are float32 in the shapes that checkpoints have.  A training step computes with what a
checkpoint would hold of them, so that the saved drafter computes what was trained.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import train_tiny
from flax import nnx

import mimo_jax as mj
from mimo_jax import checkpoint
from mimo_jax.checkpoint.names import declared
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.decoding.autoregressive import expanded
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Make, ParamSpec
from mimo_jax.quant import QuantizedArray, dequantize, quantize_fp8

Weights = dict[str, jax.Array]


def drafter_config(config: MiMoConfig, mask_token_id: int) -> DFlashConfig:
    """The DFlash drafter of a backbone, in the proportions of the releases (MODEL_SPEC 1.2).

    These have 5 layers as wide as the backbone's dense ones, its query heads, each as wide as its
    values, and 8 KV heads as its sliding layers have.  A backbone of fewer than 20 layers gets a
    drafter of a quarter of them, and a narrower one.
    """
    layers = min(5, max(1, config.num_hidden_layers // 4))
    width = config.intermediate_size if layers == 5 else 2 * config.hidden_size
    raw = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.swa_num_key_value_heads,
        "head_dim": config.v_head_dim,
        "v_head_dim": config.v_head_dim,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10_000,
        "layer_types": ["sliding_attention"] * layers,
        "use_sliding_window": True,
        "sliding_window": 1024,
        "is_causal": False,
        "block_size": 8,
        "dflash_config": {
            "target_layer_ids": list(target_layers(config)),
            "mask_token_id": mask_token_id,
            "attention_value_scale": 0.612,
            "attention_sink_bias": True,
        },
        "num_target_layers": config.num_hidden_layers,
        "target_hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layernorm_epsilon,
        "dtype": config.dtype,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
    }
    return DFlashConfig.from_dict(raw)


def target_layers(config: MiMoConfig, count: int = 5) -> tuple[int, ...]:
    """Layers evenly from the first to the last that a drafter looks at.

    The releases' are full-attention layers, for both sizes at floor(i (n - 1) / 4) of the n there
    are; a model with too few of these, or that does not end in one, is looked at after all kinds.
    """
    full = [s.index for s in config.layers if s.window is None]
    every = list(range(config.num_hidden_layers))
    among = full if len(full) >= count and full[-1] == every[-1] else every
    count = min(count, len(among))
    if count == 1:
        return (among[-1],)
    return tuple(among[i * (len(among) - 1) // (count - 1)] for i in range(count))


@dataclasses.dataclass(frozen=True)
class Part:
    """A drafter to train.

    Attributes:
      name: "mtp" or "dflash".
      build: makes its module.
      dtype: of weights that are not quantised in a checkpoint.
      layers: of the backbone, whose output it looks at.
    """

    name: str
    build: Callable[[Make], Any]
    dtype: str
    layers: tuple[int, ...] = ()

    @functools.cached_property
    def specs(self) -> dict[str, ParamSpec]:
        """Every parameter's declaration by tensor name."""
        return {spec.name: spec for spec in declared(self.build)}

    def initial(self, key: jax.Array) -> Weights:
        """Random float32 masters."""
        return train_tiny.initial_weights(self.specs, key)

    def dense(self, weights: Weights, dtype: Any) -> Any:
        """The module with what a checkpoint would hold, dense, in a compute dtype.

        Gradients pass as if nothing were rounded.
        """

        def make(spec: ParamSpec) -> jax.Array:
            w = weights[spec.name]
            rounded = dequantize(quantized(spec, w, self.dtype), jnp.float32)
            w = w + jax.lax.stop_gradient(rounded - w)
            return w.astype(dtype).reshape(spec.shape)

        return self.build(make)

    def stored(self, weights: Weights) -> Any:
        """The module with its weights as a checkpoint holds them."""

        def make(spec: ParamSpec) -> Any:
            value = quantized(spec, weights[spec.name], self.dtype)
            # What has another shape in memory is never quantised.
            return value if spec.stored_shape is None else value.reshape(spec.shape)

        return self.build(make)


def quantized(spec: ParamSpec, w: jax.Array, dtype: str) -> Any:
    """A weight in the form the releases store it in; others than FP8 ones are of `dtype`."""
    return quantize_fp8(w) if spec.format == "fp8" else w.astype(spec.dtype or dtype)


def mtp_part(lm: mj.LanguageModel, blocks: int) -> Part:
    """So many MTP blocks for a backbone."""
    chunks = lm.loaded.layout.chunks
    return Part("mtp", lambda make: MTP(lm.config, blocks, make, chunks), lm.config.dtype)


def dflash_part(lm: mj.LanguageModel, file: Path | None) -> Part:
    """A DFlash drafter for a backbone, of the sizes in a config.json, or of the releases'.

    Raises:
      ConfigError: the file is not a drafter's config.
      ValueError: the config is of another backbone.
    """
    if file is not None:
        config = DFlashConfig.from_dict(json.loads(file.read_text()))
    else:
        # The first id that the tokenizer does not have, as in the releases.
        spare = min(lm.decoder.valid_vocabulary, lm.config.vocab_size - 1)
        config = drafter_config(lm.config, spare)
    sizes = (config.hidden_size, config.num_target_layers)
    wanted = (lm.config.hidden_size, lm.config.num_hidden_layers)
    if sizes != wanted:
        raise ValueError(
            f"the drafter's hidden_size and num_target_layers are {sizes}; the backbone's are "
            f"{wanted}, give a drafter config of these"
        )
    layers = config.target_layer_ids
    return Part("dflash", lambda make: DFlash(config, make), config.dtype, layers)


def optimizer(
    kind: str, specs: dict[str, ParamSpec], peak: float, steps: int, decay: float
) -> optax.GradientTransformation:
    """Muon (for matrices, AdamW for vectors) or AdamW; warm-up, cosine to 0, gradients of norm 1.

    Vectors are not decayed by AdamW.
    """
    if kind == "muon":
        return train_tiny.optimizer(specs, peak, steps, decay)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 25), steps, 0.0)
    matrices = {name: len(spec.stored_shape or spec.shape) > 1 for name, spec in specs.items()}
    adam = optax.adamw(schedule, b2=0.95, weight_decay=decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), adam)


def frozen(model: MiMo) -> MiMo:
    """The backbone to look at, with dense weights for quantised if those are few."""
    leaves, structure = jax.tree.flatten(model, is_leaf=lambda x: isinstance(x, QuantizedArray))
    return jax.tree.unflatten(structure, expanded(leaves, jnp.dtype(model.config.dtype)))


def save(
    folder: Path, lm: mj.LanguageModel, trained: dict[str, nnx.Module], shard_bytes: int
) -> None:
    """Writes a checkpoint: the backbone as it was loaded, trained drafters, and those it had."""
    mtp: Any = trained.get("mtp", lm.mtp)
    drafter: Any = trained.get("dflash", lm.drafter)
    loaded = dataclasses.replace(lm.loaded, mtp=mtp, drafter=drafter)
    checkpoint.save(folder, loaded, max_shard_size=shard_bytes)
    checkpoint.copy_tokenizer(lm.loaded.folder, folder)
