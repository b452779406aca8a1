"""The smallest slice of each kind of device that holds a model, by its plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mimo_jax.config import MiMoConfig
from mimo_jax.planning import make_plan
from mimo_jax.portability.places import arranged, slice_devices
from mimo_jax.portability.results import Room, Slice
from sharding.devices import find_device
from sharding.rules import ShardingError

BATCHES = (1, 16, 64)
CONTEXTS = (4096, 32_768, 131_072)
# Chips of the slices that are offered, the smallest first.
_FLAT = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("a100", "h100", "h200", "b200"), ("1", "2", "4", "8", "16", "32", "64")),
    **dict.fromkeys(("v5e", "v6e"), _FLAT),
    **dict.fromkeys(("v4", "v5p", "tpu7x"), _CUBES),
}


def slices(name: str, config: MiMoConfig, kinds: Sequence[str] = tuple(TOPOLOGIES)) -> list[Slice]:
    """The smallest slice of each kind.

    Args:
      name: of the model.
      config: its configuration.
      kinds: of devices, as in `sharding.devices`.
    """
    return [_smallest(name, config, kind) for kind in kinds]


def _smallest(name: str, config: MiMoConfig, kind: str) -> Slice:
    usable = int(find_device(kind).usable.value)
    for topology, devices, plan in _plans(config, kind):
        if plan.fits:
            weights = dict(plan.memory.spent)["weights"]
            rooms = tuple(_rooms(config, kind, arranged(devices)))
            return Slice(name, kind, topology, devices, arranged(devices), weights, usable, rooms)
    reason = f"none up to {TOPOLOGIES[kind][-1]} holds it at batch 1 and context {CONTEXTS[0]}"
    return Slice(name, kind, "", 0, "", 0, usable, (), reason)


def _plans(config: MiMoConfig, kind: str) -> Iterator[tuple[str, int, Any]]:
    for topology in TOPOLOGIES[kind]:
        devices = slice_devices(kind, topology)
        try:
            yield topology, devices, _plan(config, kind, arranged(devices), 1, CONTEXTS[0])
        except ShardingError:  # so many don't divide the model
            continue


def _rooms(config: MiMoConfig, kind: str, mesh: str) -> Iterator[Room]:
    for batch in BATCHES:
        for context in CONTEXTS:
            if context <= config.max_position_embeddings:
                plan = _plan(config, kind, mesh, batch, context)
                yield Room(batch, context, plan.memory.needed, plan.fits)


def _plan(config: MiMoConfig, kind: str, mesh: str, batch: int, context: int) -> Any:
    context = min(context, config.max_position_embeddings)
    return make_plan(config, device=kind, mesh=mesh, batch=batch, context=context)
