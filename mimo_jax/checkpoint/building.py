"""Modules with the parameters of a checkpoint, on one device or split over a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, Sharding

from mimo_jax.checkpoint.layout import Layout
from mimo_jax.checkpoint.names import declared
from mimo_jax.checkpoint.streaming import memory_needed
from mimo_jax.config import MiMoConfig
from mimo_jax.model.backbone import MiMo
from mimo_jax.model.dflash import DFlash
from mimo_jax.model.mtp import MTP
from mimo_jax.model.parameters import Format, Make, ParamSpec, value_format
from mimo_jax.model.placement import Placement
from sharding.memory import check_memory
from sharding.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory.

    Attributes:
      config: of the backbone, as its weights are in memory.
      model: the backbone.
      mtp: its multi-token-prediction blocks, if there are any.
      drafter: its DFlash drafter, if there is one.
      layout: how the folder stores these weights (densely, if they were dequantised).
      folder: where they came from.
      placement: the mesh that the parameters are on and how they are split; None without a mesh.
    """

    config: MiMoConfig
    model: MiMo
    mtp: MTP | None
    drafter: DFlash | None
    layout: Layout
    folder: Path
    placement: Placement | None = None


@dataclasses.dataclass(frozen=True)
class Part:
    """A module to load.

    Attributes:
      build: makes it.
      values: what the value of each of its parameters will be made from: anything that has the
        shape and dtype of an array, or a quantised array of two such things.
    """

    build: Callable[[Make], Any]
    values: Make


# Arrays in the place of the leaves of a tree, each with the sharding at its position in a list.
Fill = Callable[[Any, Sequence[Sharding | None]], Any]


def build_parts(
    parts: Mapping[str, Part], mesh: Mesh | None, rules: str | ShardingRules, fill: Fill
) -> tuple[dict[str, Any], Placement | None]:
    """The modules, by the names of their parts, and where their parameters are.

    Raises:
      ShardingError: the mesh does not divide the model.
      NotEnoughMemoryError: the weights do not fit; nothing has been allocated.
    """
    specs = {name: declared(part.build) for name, part in parts.items()}
    values = {name: {s.name: parts[name].values(s) for s in specs[name]} for name in parts}
    leaves = jax.tree.leaves(values)
    shardings: list[Any] = [None] * len(leaves)
    placement = None
    if mesh is not None:
        held: list[tuple[ParamSpec, Format]] = [
            (s, value_format(values[name][s.name])) for name in parts for s in specs[name]
        ]
        placement = Placement.fit(mesh, rules, held)
        placed = {
            name: {s.name: placement.shardings(s, values[name][s.name]) for s in specs[name]}
            for name in parts
        }
        shardings = jax.tree.leaves(placed)
    check_memory(memory_needed(zip(leaves, shardings, strict=True)))
    filled = fill(values, shardings)
    built = {
        name: part.build(lambda spec, own=filled[name]: own[spec.name])
        for name, part in parts.items()
    }
    return built, placement
