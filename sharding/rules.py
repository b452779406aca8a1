"""Rules that say over which mesh axes a logical axis is split.

A parameter's dimensions have logical axes ("kv_heads", "mlp", ...).  `ShardingRules` maps these to
mesh axes and is all there is to choose: every array's sharding, and from it every collective,
follows.  Named rules (`PRESETS`) are fitted to a model's sizes: what does not divide goes to the
logical axis that can take its place (`SPILLS`), or is refused.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.plan import Group, explain

Axes = tuple[str, ...]
Sizes = Mapping[str, int]


class ShardingError(ValueError):
    """Rules that contradict themselves or a model; the message says what to change."""


# Mesh axes over which the rules of each name split logical axes.
#
# single: everything everywhere, for one device.
# latency: tensor-parallel attention over all of expert x tensor, whole groups of experts over
#   expert and each expert's width over tensor.  Tokens are on every device, so a layer has two
#   all-reduces and nothing else; the batch may be split over data.
# latency_experts: the same with whole experts over all of expert x tensor: no expert is cut, at the
#   price of uneven work.
# throughput: the batch is split over data x expert and attention with it; tokens travel to their
#   experts, which are split over expert, and back.
# wide_experts: the same with experts split over data x expert, so that no copy of an expert exists.
PRESETS: dict[str, dict[str, Axes]] = {
    "single": {},
    "latency": {
        "batch": ("data",),
        **dict.fromkeys(("kv_heads", "mlp", "vocab", "features"), ("expert", "tensor")),
        "expert": ("expert",),
        "expert_mlp": ("tensor",),
    },
    "latency_experts": {
        "batch": ("data",),
        **dict.fromkeys(("kv_heads", "mlp", "vocab", "features"), ("expert", "tensor")),
        "expert": ("expert", "tensor"),
    },
    "throughput": {
        "batch": ("data", "expert"),
        **dict.fromkeys(("kv_heads", "mlp", "vocab", "features", "expert_mlp"), ("tensor",)),
        "expert": ("expert",),
    },
    "wide_experts": {
        "batch": ("data", "expert"),
        **dict.fromkeys(("kv_heads", "mlp", "vocab", "features", "expert_mlp"), ("tensor",)),
        "expert": ("data", "expert"),
    },
}

# Where mesh axes go that a logical axis is too small, or cut into too large blocks, to be split by:
# fewer KV heads than devices split their groups of query heads (KV heads are then on several
# devices), and the QKV rows inside a chunk; experts too narrow to be cut are split as whole ones.
SPILLS: dict[str, Axes] = {"kv_heads": ("group", "qkv_row"), "expert_mlp": ("expert",)}
# Axes that a fitted rule gives up on rather than refuse: such arrays are then on every device.
OPTIONAL = ("vocab", "features", "mlp", "group", "qkv_row")


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Mesh axes of each logical axis; a logical axis without a rule is not split.

    Attributes:
      axes: (logical axis, mesh axes) pairs, sorted.
    """

    axes: tuple[tuple[str, Axes], ...] = ()

    @classmethod
    def of(cls, mapping: Mapping[str, str | Sequence[str] | None]) -> ShardingRules:
        """Rules from a mapping; None, "" and () all mean that an axis is not split."""
        given = {k: (v,) if isinstance(v, str) else tuple(v or ()) for k, v in mapping.items()}
        kept = {k: tuple(a for a in v if a) for k, v in given.items()}
        return cls(tuple(sorted((k, v) for k, v in kept.items() if v)))

    @classmethod
    def preset(cls, name: str) -> ShardingRules:
        """The rules of that name, not fitted to any model yet.

        Raises:
          ShardingError: there is no such name.
        """
        if name not in PRESETS:
            raise ShardingError(f"no rules are called {name!r}; there are {', '.join(PRESETS)}")
        return cls.of(PRESETS[name])

    def __getitem__(self, logical: str | None) -> Axes:
        """Mesh axes that split a logical axis; () if nothing does."""
        return dict(self.axes).get(logical, ()) if logical else ()

    def replace(self, **changes: str | Sequence[str] | None) -> ShardingRules:
        """These rules with those of some logical axes changed."""
        return self.of({**dict(self.axes), **changes})

    def ways(self, logical: str | None, mesh: Mesh | AbstractMesh) -> int:
        """Into how many parts a mesh splits a logical axis."""
        return math.prod(mesh.shape[a] for a in self[logical])

    def spec(self, axes: Iterable[str | None]) -> PartitionSpec:
        """The partition of an array with these logical axes."""
        return PartitionSpec(*(_entry(self[a]) for a in axes))

    def fitted(self, sizes: Sizes, mesh: Mesh | AbstractMesh) -> ShardingRules:
        """Rules that split by this mesh what these sizes let them.

        Mesh axes of size 1 are dropped.  Of the mesh axes of a logical axis that does not divide,
        those that do divide together (as many devices as possible) stay, and the others go to the
        axes of SPILLS; an axis of OPTIONAL stays whole instead.

        Args:
          sizes: by logical axis, what its parts' number must divide: the greatest common divisor
            over all arrays, in units that must not be cut.
          mesh: the mesh.

        Raises:
          ShardingError: something divides neither way, or a mesh axis is unknown.
        """
        shape = dict(mesh.shape)
        rules = {logical: list(axes) for logical, axes in self.axes}
        for logical, axes in rules.items():
            if unknown := [a for a in axes if a not in shape]:
                raise ShardingError(
                    f"the rule of {logical!r} names mesh axes {unknown}; the mesh has "
                    f"{', '.join(shape)}"
                )
            rules[logical] = [a for a in axes if shape[a] > 1]
        for logical, others in SPILLS.items():
            axes = rules.get(logical, [])
            rules[logical] = _largest_dividing(axes, sizes.get(logical, 0), shape)
            for other in others:
                left = [a for a in axes if a not in rules[logical]]
                rules[other] = [*rules.get(other, ()), *left]
        for logical in rules.keys() - SPILLS.keys():
            axes, size = rules[logical], sizes.get(logical, 0)
            rules[logical] = _largest_dividing(axes, size, shape)
            if rules[logical] != axes and logical not in OPTIONAL:
                raise ShardingError(_indivisible(logical, size, axes, shape))
        return self.of(rules)

    def check(
        self, name: str, axes: Sequence[str | None], sizes: Sequence[int], mesh: Mesh | AbstractMesh
    ) -> None:
        """Refuses to split one array in a way that cannot be.

        Args:
          name: the array's, for the message.
          axes: its logical axes.
          sizes: its dimensions.
          mesh: the mesh.

        Raises:
          ShardingError: two dimensions would be split by one mesh axis, or a dimension is not
            divisible.
        """
        used: dict[str, str | None] = {}
        for logical, size in zip(axes, sizes, strict=True):
            for mesh_axis in self[logical]:
                if mesh_axis in used:
                    raise ShardingError(
                        f"{name}: rules split both {used[mesh_axis]!r} and {logical!r} by mesh "
                        f"axis {mesh_axis!r}; an array can use a mesh axis once"
                    )
                used[mesh_axis] = logical
            if size % self.ways(logical, mesh):
                raise ShardingError(
                    f"{name}: {_indivisible(logical, size, self[logical], mesh.shape)}"
                )

    def explain(
        self,
        mesh: Mesh | AbstractMesh,
        groups: Sequence[Group] = (),
        *,
        wanted: ShardingRules | None = None,
        sizes: Sizes | None = None,
    ) -> str:
        """A table of how each logical axis is split and why not, and of what each device holds.

        Args:
          mesh: the mesh.
          groups: of arrays, with their bytes.
          wanted: the rules that these were fitted from, to say what did not divide.
          sizes: those that `fitted` was given.
        """
        used, asked = dict(self.axes), None if wanted is None else dict(wanted.axes)
        return explain(used, mesh.shape, groups, wanted=asked, sizes=sizes, spills=SPILLS)

    def __str__(self) -> str:
        return ", ".join(f"{k}: {' x '.join(v)}" for k, v in self.axes) or "nothing is split"


def _entry(axes: Axes) -> str | Axes | None:
    return axes if len(axes) > 1 else (axes[0] if axes else None)


def _largest_dividing(axes: Sequence[str], size: int, shape: Mapping[str, int]) -> list[str]:
    """The mesh axes, in their order, that divide `size` together among as many devices as can."""
    best: list[str] = []
    for chosen in range(1 << len(axes)):
        some = [a for i, a in enumerate(axes) if chosen >> i & 1]
        ways = math.prod(shape[a] for a in some)
        if size % ways == 0 and ways > math.prod(shape[a] for a in best):
            best = some
    return best


def _indivisible(
    logical: str | None, size: int, axes: Sequence[str], shape: Mapping[str, int]
) -> str:
    ways = math.prod(shape[a] for a in axes)
    by = " x ".join(f"{a}={shape[a]}" for a in axes)
    return (
        f"{logical} has {size} indivisible parts, which {by} = {ways} devices cannot share evenly; "
        "choose a mesh that divides it, or other rules"
    )
