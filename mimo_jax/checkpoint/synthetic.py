"""A model with random weights in the place of a checkpoint's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mimo_jax.checkpoint.layout import release_layout
from mimo_jax.checkpoint.loading import Loaded, model_dtype
from mimo_jax.checkpoint.names import declared
from mimo_jax.checkpoint.streaming import memory_needed
from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.placement import Placement
from mimo_jax.model.random_weights import random_release, shapes
from sharding.memory import check_memory
from sharding.rules import ShardingRules


def random_weights(
    config: MiMoConfig,
    seed: int,
    *,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: str | ShardingRules = "latency",
) -> Loaded:
    """A backbone with random weights, made on the devices in the formats that its config announces.

    It has no tokenizer, MTP blocks or drafter; as a whole it is what `load` returns.

    Args:
      config: the model's.
      seed: the same seed gives the same weights on any mesh.
      dtype: of weights that are not quantised, instead of the config's.
      mesh, rules: as for `load`.

    Raises:
      ValueError: `dtype` is not one of those that exist.
      ShardingError: the mesh does not divide the model.
      NotEnoughMemoryError: the weights would not fit; nothing has been allocated.
    """
    if dtype is not None:
        config = dataclasses.replace(config, dtype=model_dtype(dtype))

    def build(make: Any) -> MiMo:
        return MiMo(config, make)

    specs = declared(build)
    placement = None
    if mesh is not None:
        placement = Placement.fit(mesh, rules, [(s, s.format) for s in specs])
    held = {spec.name: shapes(spec, config.dtype) for spec in specs}
    leaves, placed = jax.tree.leaves([held[s.name] for s in specs]), None
    if placement is not None:
        placed = jax.tree.leaves([placement.shardings(s, held[s.name]) for s in specs])
    check_memory(memory_needed(zip(leaves, placed or [None] * len(leaves), strict=True)))
    model = build(random_release(seed, config.dtype, placement))
    return Loaded(
        config, model, None, None, release_layout(config), Path("random weights"), placement
    )
