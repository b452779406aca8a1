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
from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
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
    mtp_blocks: int = 0,
    drafter: DFlashConfig | None = None,
) -> Loaded:
    """A model with random weights, made on the devices in the formats that its config announces.

    It has no tokenizer; as a whole it is what `load` returns.

    Args:
      config: the backbone's.
      seed: the same seed gives the same weights on any mesh.
      dtype: of weights that are not quantised, instead of the config's.
      mesh: as for `load`.
      rules: as for `load`.
      mtp_blocks: MTP blocks besides.
      drafter: a DFlash drafter besides.

    Raises:
      ValueError: `dtype` is not one of those that exist.
      ShardingError: no rules are called so, or the mesh does not divide the model.
      NotEnoughMemoryError: the weights would not fit; nothing has been allocated.
    """
    if isinstance(rules, str):
        ShardingRules.preset(rules)  # or it says which there are, without a mesh too
    if dtype is not None:
        config = dataclasses.replace(config, dtype=model_dtype(dtype))

    def build(make: Any) -> tuple[MiMo, MTP | None, DFlash | None]:
        return (
            MiMo(config, make),
            MTP(config, mtp_blocks, make) if mtp_blocks else None,
            DFlash(drafter, make) if drafter else None,
        )

    specs = declared(build)
    placement = None
    if mesh is not None:
        placement = Placement.fit(mesh, rules, [(s, s.format) for s in specs])
    held = {spec.name: shapes(spec, config.dtype) for spec in specs}
    leaves, placed = jax.tree.leaves([held[s.name] for s in specs]), None
    if placement is not None:
        placed = jax.tree.leaves([placement.shardings(s, held[s.name]) for s in specs])
    check_memory(memory_needed(zip(leaves, placed or [None] * len(leaves), strict=True)))
    modules = build(random_release(seed, config.dtype, placement))
    return Loaded(config, *modules, release_layout(config), Path("random weights"), placement)
