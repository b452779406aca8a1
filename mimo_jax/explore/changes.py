"""Models that differ from a loaded one in something, beside it and with the same weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.language_model import LanguageModel
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.moe import MoE

# What is done to a model of one's own: attributes may be set, and parameters replaced.
Change = Callable[[MiMo], None]

# Added to the router's score, which is between 0 and 1, of experts that are not to be chosen.
_NEVER = -1e9


def changed(lm: LanguageModel, *changes: Change) -> LanguageModel:
    """Another model with these changes, with the weights of the first where nothing was changed.

    The first stays as it is.  Drafters are the same, so that they can be seen to fit less well.

    Args:
      lm: the model to start from.
      changes: functions of this module, or any that change the `MiMo` they are given.
    """
    model = nnx.clone(lm.model)
    for change in changes:
        change(model)
    return LanguageModel(dataclasses.replace(lm.loaded, model=model, config=model.config))


def top_k(experts: int) -> Change:
    """Has each token use so many experts in every layer that has some.

    Raises:
      ValueError: the change, of a model that does not have as many.
    """

    def change(model: MiMo) -> None:
        there = model.config.n_routed_experts
        if not 0 < experts <= there:
            raise ValueError(f"top_k({experts}): the model has {there} experts a layer")
        model.config = dataclasses.replace(model.config, num_experts_per_tok=experts)
        for layer in model.layers:
            if isinstance(layer.mlp, MoE):
                layer.mlp.top_k = experts

    return change


def window(positions: int) -> Change:
    """Has sliding layers see so many positions, a token's own included.

    Raises:
      ValueError: `positions` is not positive.
    """
    if positions < 1:
        raise ValueError(f"window({positions}): a token sees itself at least")

    def change(model: MiMo) -> None:
        model.config = dataclasses.replace(model.config, sliding_window=positions)
        for layer, spec in zip(model.layers, model.config.layers, strict=True):
            layer.self_attn.layer = spec

    return change


def without_heads(layer: int, *heads: int) -> Change:
    """Takes away what query heads of a layer contribute: their columns of o_proj become zeros.

    Raises:
      ValueError: the change, of a model without such a layer or head.
    """

    def change(model: MiMo) -> None:
        spec = model.config.layers[_index(layer, len(model.layers), "layer")]
        param = model.layers[layer].self_attn.o_proj
        weights = param.get_value()  # [D, K, G * V]
        group = spec.num_heads // spec.num_kv_heads
        kept = np.ones((spec.num_kv_heads, group, spec.v_head_dim), np.float32)
        for head in heads:
            kept[divmod(_index(head, spec.num_heads, "head"), group)] = 0
        param.set_value(weights * jnp.asarray(kept.reshape(weights.shape[1:]), weights.dtype))

    return change


def without_experts(layer: int, *experts: int) -> Change:
    """Has the router of a layer never choose these experts: tokens go to the next best.

    Raises:
      ValueError: the change, of a model without such a layer or expert, of a layer that is not a
        mixture of experts, or if too few were left for the router's top k.
    """

    def change(model: MiMo) -> None:
        mlp = model.layers[_index(layer, len(model.layers), "layer")].mlp
        if not isinstance(mlp, MoE):
            raise ValueError(f"layer {layer} is not a mixture of experts")
        there = model.config.n_routed_experts
        gone = sorted({_index(e, there, "expert") for e in experts})
        if there - len(gone) < mlp.top_k:
            raise ValueError(f"{there - len(gone)} experts are left; a token uses {mlp.top_k}")
        bias = mlp.e_score_correction_bias
        bias.set_value(bias.get_value().at[np.array(gone, np.int32)].set(_NEVER))

    return change


def _index(i: int, size: int, what: str) -> int:
    if not 0 <= i < size:
        raise ValueError(f"there is no {what} {i}; give 0 to {size - 1}")
    return i
