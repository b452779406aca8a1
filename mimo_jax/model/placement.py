"""Where parameters and caches go on a mesh: their logical axes put through sharding rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from mimo_jax.model.parameters import Format, ParamSpec, parameters
from mimo_jax.quant import BLOCKS, FP8Array, MXFP4Array
from sharding.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the rules by which a model is split over it.

    Attributes:
      mesh: in explicit mode.
      rules: fitted to the model.
    """

    mesh: Any
    rules: ShardingRules

    @classmethod
    def fit(
        cls,
        mesh: Mesh | AbstractMesh,
        rules: str | ShardingRules,
        parameters: Iterable[tuple[ParamSpec, Format]],
    ) -> Placement:
        """Named rules fitted to the sizes of these parameters, or given rules as they are.

        Args:
          mesh: in explicit mode.
          rules: a name of `sharding.rules.PRESETS`, or rules.
          parameters: declarations, with the format each is held in.

        Raises:
          ShardingError: the rules are unknown, or the mesh does not divide the model.
        """
        held = list(parameters)
        if isinstance(rules, str):
            rules = ShardingRules.preset(rules).fitted(indivisible_sizes(held), mesh)
        placement = cls(mesh, rules)
        for spec, fmt in held:
            placement.check(spec, fmt)
        return placement

    @property
    def batch_ways(self) -> int:
        """Into how many parts a batch is split."""
        return self.rules.ways("batch", self.mesh)

    def check(self, spec: ParamSpec, fmt: Format) -> None:
        """Refuses rules that cannot split a parameter.

        Raises:
          ShardingError: with a sentence that says which rule and why.
        """
        sizes = [n // u for n, u in zip(spec.shape, units(spec, fmt), strict=True)]
        self.rules.check(spec.name, spec.axes, sizes, self.mesh)

    def sharding(
        self, name: str, axes: Sequence[str | None], shape: Sequence[int]
    ) -> NamedSharding:
        """The sharding of an array with these logical axes.

        Raises:
          ShardingError: it cannot be split so; `name` says in the message what it is.
        """
        self.rules.check(name, axes, shape, self.mesh)
        return NamedSharding(self.mesh, self.rules.spec(axes))

    def shardings(self, spec: ParamSpec, value: Any) -> Any:
        """A parameter's value (arrays, or anything that has shapes) as a tree of shardings.

        Codes are split as the parameter is.  Scales are too, where every part has whole blocks;
        else they are on every device, which has then the right ones for any part.
        """

        def of(array: Any, blocks: tuple[int, int]) -> NamedSharding:
            ways = [self.rules.ways(a, self.mesh) for a in spec.axes]
            per = [1] * (len(ways) - 2) + list(blocks)
            axes = [
                axis if size % (n * block) == 0 else None
                for axis, size, n, block in zip(spec.axes, spec.shape, ways, per, strict=True)
            ]
            return self.sharding(spec.name, axes, array.shape)

        if isinstance(value, FP8Array | MXFP4Array):
            codes, scales = BLOCKS[type(value)]
            return type(value)(of(value.codes, codes), of(value.scales, scales))
        return self.sharding(spec.name, spec.axes, value.shape)

    def place(self, module: Any) -> Any:
        """The module with its parameters on the mesh; for small ones, which are whole somewhere."""
        leaves, tree = jax.tree.flatten(module)
        placed = jax.tree.unflatten(tree, leaves)  # a copy: `module` stays as it is
        for _, param in parameters(placed):
            value = param.get_value()
            param.set_value(jax.device_put(value, self.shardings(param.spec, value)))
        return placed


def units(spec: ParamSpec, fmt: Format) -> tuple[int, ...]:
    """What must not be cut of each dimension of a parameter.

    The experts' kernels work on a part of an expert's width, and need whole blocks of scales.
    """
    width = 1
    if fmt != "plain":
        width = math.lcm(*BLOCKS[FP8Array if fmt == "fp8" else MXFP4Array][1])
    return tuple(
        (n if n % width else width) if axis == "expert_mlp" else 1
        for axis, n in zip(spec.axes, spec.shape, strict=True)
    )


def indivisible_sizes(parameters: Iterable[tuple[ParamSpec, Format]]) -> dict[str, int]:
    """By logical axis, the number of parts that all parameters with that axis can be cut into."""
    sizes: dict[str, int] = {}
    for spec, fmt in parameters:
        for axis, size, unit in zip(spec.axes, spec.shape, units(spec, fmt), strict=True):
            if axis is not None:
                sizes[axis] = math.gcd(sizes.get(axis, 0), size // unit)
    return sizes
