"""A plan: does a model fit on a mesh of devices, what is left, and how fast could a step be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from mimo_jax.config import DFlashConfig, MiMoConfig
from mimo_jax.model.placement import Placement, indivisible_sizes
from mimo_jax.planning import report
from mimo_jax.planning.inventory import Held, Placed, declarations, inventory, place
from mimo_jax.planning.memory import Cache, Workspace, workspace
from mimo_jax.planning.steps import Step, step
from sharding.devices import Device, find_device
from sharding.mesh import AXES, describe, parse_mesh
from sharding.plan import Group, Memory, abstract_mesh, grouped, largest
from sharding.rules import ShardingError, ShardingRules

# Devices of the largest mesh that is suggested.
MOST_DEVICES = 1024


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a model needs on a mesh and how fast it could be; `str(plan)` is for people.

    Attributes:
      name: the model's.
      device: the kind.
      mesh: sizes by axis.
      placement: the rules in effect, on an abstract mesh.
      wanted: these rules as they were asked for, before they were fitted to the model.
      sizes: by logical axis, the parts that the model's parameters can be cut into.
      batch: rows, rounded up to what the mesh splits them into.
      context: positions of each row that the cache holds.
      weights: bytes by group.
      cache: the key/value cache.
      workspace: temporary memory.
      memory: all of it, against what a device has.
      largest_context: at this batch, positions that fit, at most the model's.
      largest_batch: at this context.
      token: the step of one token a row.
      verify: the step of several tokens a row, which a drafter made.
      prefill: the step that runs a whole context.
      suggestion: the smallest mesh on which it fits, if it does not and there is one.
    """

    name: str
    device: Device
    mesh: Mapping[str, int]
    placement: Placement
    wanted: ShardingRules
    sizes: Mapping[str, int]
    batch: int
    context: int
    weights: tuple[Group, ...]
    cache: Cache
    workspace: Workspace
    memory: Memory
    largest_context: int
    largest_batch: int
    token: Step
    verify: Step
    prefill: Step
    suggestion: str | None

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.mesh.values())

    @property
    def fits(self) -> bool:
        """Whether everything fits into the devices' memory."""
        return self.memory.fits

    def tokens_per_second(self, gained: float) -> float | None:
        """Roofline tokens a second of all rows, if a verify step gains so many a row; None where
        the device's speed is not known."""
        limits = self.verify.limits
        return None if limits is None else gained * self.batch / limits.seconds

    def verdict(self) -> str:
        """A sentence on whether it fits, and on what does if it doesn't."""
        return report.verdict(self)

    def explain(self) -> str:
        """A table of how each logical axis is split, and of what each device holds."""
        placement = self.placement
        return placement.rules.explain(
            placement.mesh, self.weights, wanted=self.wanted, sizes=self.sizes
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON; bytes and seconds."""
        return report.as_dict(self)

    def __str__(self) -> str:
        return report.text(self)


@dataclasses.dataclass(frozen=True)
class _Model:
    """What a plan is made for, and how it is on one mesh."""

    config: MiMoConfig
    held: tuple[Held, ...]
    placement: Placement
    placed: list[Placed]
    cache: Cache
    prompt: int
    given: int | None

    @classmethod
    def on(
        cls,
        sizes: Mapping[str, int],
        rules: str | ShardingRules,
        config: MiMoConfig,
        held: tuple[Held, ...],
        dtype: str,
        prompt: int,
        given: int | None,
    ) -> _Model:
        placement = Placement.fit(abstract_mesh(sizes), rules, declarations(held))
        cache = Cache.of(config, placement, dtype)
        return cls(config, held, placement, place(held, placement), cache, prompt, given)

    def rows(self, batch: int) -> int:
        """The batch as a decoder pads it: a multiple of what the mesh splits it into."""
        return -(-batch // self.cache.ways) * self.cache.ways

    def workspace(self, batch: int, context: int) -> Workspace:
        if self.given is not None:
            return Workspace((("given", self.given),), estimated=False)
        return workspace(
            self.config,
            self.placement,
            self.placed,
            self.cache,
            batch=batch,
            context=context,
            prompt=min(self.prompt, context),
        )

    def memory(self, batch: int, context: int, usable: int) -> Memory:
        spent = (
            ("weights", sum(p.per_device for p in self.placed)),
            ("KV cache", self.cache.per_device(batch, context)),
            ("workspace", self.workspace(batch, context).total),
        )
        return Memory(spent, usable)


def make_plan(
    config: MiMoConfig,
    *,
    device: Device | str,
    mesh: str | Mapping[str, int] | Mesh | AbstractMesh = "",
    rules: str | ShardingRules = "latency",
    batch: int = 1,
    context: int = 4096,
    prompt: int = 512,
    verify: int = 8,
    dtype: str | None = None,
    quantized: bool = True,
    layers: int | None = None,
    mtp_blocks: int = 0,
    drafter: DFlashConfig | None = None,
    workspace_bytes: int | None = None,
    name: str = "model",
) -> Plan:
    """Plans a model on a mesh of devices, none of which need be there.

    Weights and cache are exactly what is allocated; the workspace is an estimate, unless given.
    Times are rooflines: what the bytes and FLOPs take at the device's full speed.

    Args:
      config: of the model.
      device: the kind, or its name (`sharding.devices.NAMES`).
      mesh: text such as "expert=2,tensor=4", sizes by axis, or a mesh.
      rules: a name of `sharding.rules.PRESETS`, or rules.
      batch: rows (sequences).
      context: positions of each row.
      prompt: tokens of a prompt, which are run at once and decide the size of the workspace.
      verify: tokens of the step that verifies drafts.
      dtype: of the cache and of weights that are not quantised; the config's by default.
      quantized: hold weights in the release's formats, and not dense.
      layers: take only so many of the first layers.
      mtp_blocks: MTP blocks that are held besides; their time is not counted.
      drafter: a DFlash drafter that is held besides and runs before each verify step.  Its cache
        is not counted.
      workspace_bytes: temporary memory on each device, where it is known:
        `compiled.memory_analysis().temp_size_in_bytes` of the largest program.
      name: of the model, for the output.

    Raises:
      DeviceError: the device is unknown.
      MeshError: the mesh is malformed.
      ShardingError: the rules are unknown, or the mesh does not divide the model.
      ValueError: a number is out of range.
    """
    device = find_device(device) if isinstance(device, str) else device
    sizes = mesh_sizes(mesh)
    config = config if layers is None else config.truncated(layers)
    _check_numbers(config, batch=batch, context=context, prompt=prompt, verify=verify)
    dtype = jnp.dtype(dtype or config.dtype).name
    config = dataclasses.replace(config, dtype=dtype)
    held = inventory(config, dtype, quantized=quantized, mtp_blocks=mtp_blocks, drafter=drafter)

    def on(sizes: Mapping[str, int], rules: str | ShardingRules = rules) -> _Model:
        return _Model.on(sizes, rules, config, held, dtype, prompt, workspace_bytes)

    model, whole = on(sizes), on(dict.fromkeys(AXES, 1), "single").placed
    rows, usable = model.rows(batch), _usable(device, sizes)

    def fits(rows: int, context: int) -> bool:
        return model.memory(rows, context, usable).fits

    def at(new: int, **kind: bool) -> Step:
        return step(
            config, model.placement, model.placed, whole, device,
            batch=rows, new=new, context=context, dtype=dtype, **kind,
        )  # fmt: skip

    memory = model.memory(rows, context, usable)
    most_rows = usable // max(1, model.cache.per_sequence(context)) * model.cache.ways
    return Plan(
        name=name,
        device=device,
        mesh=sizes,
        placement=model.placement,
        wanted=ShardingRules.preset(rules) if isinstance(rules, str) else rules,
        sizes=indivisible_sizes(declarations(held)),
        batch=rows,
        context=context,
        weights=grouped((p.group, p.per_device, p.once) for p in model.placed),
        cache=model.cache,
        workspace=model.workspace(rows, context),
        memory=memory,
        largest_context=largest(lambda n: fits(rows, n), config.max_position_embeddings),
        largest_batch=largest(lambda n: fits(n, context), most_rows, model.cache.ways),
        token=at(1),
        verify=at(verify, draft=drafter is not None),
        prefill=at(context, last_only=True),
        suggestion=None if memory.fits else _suggestion(on, device, sizes, batch, context),
    )


def mesh_sizes(mesh: str | Mapping[str, int] | Mesh | AbstractMesh) -> dict[str, int]:
    """Sizes by axis of a mesh in any of the forms that `make_plan` takes, 1 where not named.

    Raises:
      MeshError: it is malformed, or has other axes than `sharding.mesh.AXES`.
    """
    if isinstance(mesh, str):
        return parse_mesh(mesh)
    shape = dict(mesh) if isinstance(mesh, Mapping) else dict(mesh.shape)
    return parse_mesh(",".join(f"{axis}={size}" for axis, size in shape.items()))


def _check_numbers(config: MiMoConfig, **numbers: int) -> None:
    for what, number in numbers.items():
        if number < 1:
            raise ValueError(f"{what}={number} must be at least 1")
    context, most = numbers["context"], config.max_position_embeddings
    if context > most:
        raise ValueError(f"context={context} is more than the model's {most} positions")
    if numbers["verify"] > context:
        raise ValueError(
            f"a step of verify={numbers['verify']} tokens is longer than context={context}"
        )


def _usable(device: Device, sizes: Mapping[str, int]) -> int:
    """Bytes of a device's memory; devices that are one host's share it."""
    usable = int(device.usable.value)
    return usable // math.prod(sizes.values()) if device.shared else usable


def _suggestion(
    on: Any, device: Device, sizes: Mapping[str, int], batch: int, context: int
) -> str | None:
    """The smallest mesh with the same part for data on which everything fits."""
    if device.shared:
        return None
    for candidate in _larger_meshes(sizes):
        try:
            model = on(candidate)
        except ShardingError:
            continue
        if model.memory(model.rows(batch), context, _usable(device, candidate)).fits:
            return describe(candidate)
    return None


def _larger_meshes(sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Meshes of twice as many devices and so on: all tensor first, where that divides."""
    data, ways = sizes["data"], sizes["expert"] * sizes["tensor"]
    while 2 * ways * data <= MOST_DEVICES:
        ways *= 2
        for expert in range(1, ways + 1):
            if ways % expert == 0:
                yield {"data": data, "expert": expert, "tensor": ways // expert}
