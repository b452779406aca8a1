"""What the type of an array says of its sharding, for code that runs on any mesh and on none.

In explicit mode an array's sharding is part of its type.  Code that has to name the sharding of a
result (a contraction of two split dimensions, a gather) derives it from its operands by these
functions and so works under every set of rules; without a mesh, and inside `shard_map`, they say
None, which leaves everything as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

Entry = str | tuple[str, ...] | None


def explicit_mesh(x: Any) -> Any:
    """The mesh an array is on, if it has one and its axes are in explicit mode; else None."""
    mesh = jax.typeof(x).sharding.mesh
    explicit = not mesh.empty and all(t == AxisType.Explicit for t in mesh.axis_types)
    return mesh if explicit else None


def entries(x: Any) -> tuple[Entry, ...]:
    """The mesh axes of each dimension of an array; all None without a mesh."""
    given = tuple(jax.typeof(x).sharding.spec) if explicit_mesh(x) is not None else ()
    return given + (None,) * (x.ndim - len(given))


def axes_of(entry: Entry) -> tuple[str, ...]:
    """A partition's entry as a tuple of mesh axes."""
    return entry if isinstance(entry, tuple) else (() if entry is None else (entry,))


def sharding(like: Any, *dimensions: Entry) -> NamedSharding | None:
    """The sharding with these entries on the mesh of `like`; None without a mesh."""
    mesh = explicit_mesh(like)
    return None if mesh is None else NamedSharding(mesh, PartitionSpec(*dimensions))


def reshard(x: jax.Array, *dimensions: Entry) -> jax.Array:
    """The array with these entries; the same array where it has no mesh or has them already."""
    target = sharding(x, *dimensions)
    wanted = dimensions + (None,) * (x.ndim - len(dimensions))
    return x if target is None or wanted == entries(x) else jax.reshard(x, target)


def on_mesh(f: Callable[..., Any], out_specs: Any, *arrays: Any) -> Any:
    """f of arrays, each device doing its own parts of them.

    Args:
      f: works on any part by itself.
      out_specs: how its results are split, in `PartitionSpec`s.
      arrays: in any pytrees.
    """
    if explicit_mesh(jax.tree.leaves(arrays)[0]) is None:
        return f(*arrays)
    return jax.shard_map(
        f,
        in_specs=jax.tree.map(lambda a: PartitionSpec(*entries(a)), arrays),
        out_specs=out_specs,
        check_vma=False,  # kernels and loops are not typed by what varies
    )(*arrays)


def by_rows(f: Callable[..., Any], *args: Any) -> Any:
    """f of arrays [B, ...] whose rows it treats one by one, each device doing its own rows.

    For operations that XLA does not split by itself (it would bring all rows together): sorting,
    top-k and what is built of them.  Only the first dimension may be split, for all arrays alike,
    and f has to return arrays [B, ...] as well.
    """
    return on_mesh(f, PartitionSpec(entries(jax.tree.leaves(args)[0])[0]), *args)


def replicated(tree: Any) -> Any:
    """A tree of arrays with every one of them whole on every device."""
    return jax.tree.map(lambda x: reshard(x), tree)


def put(tree: Any, mesh: Mesh, *dimensions: Entry) -> Any:
    """A tree of host arrays on a mesh, their dimensions split by these entries.

    Every process has to give the same values."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*dimensions)))
