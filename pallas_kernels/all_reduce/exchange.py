"""Memory through which the GPUs of one host add up: each writes into that of all the others."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import backends
from pallas_kernels.backends import Target

BLOCK = 512  # values that a thread block has: 128 threads of four
MAX_DEVICES = 8  # of one host
# Values that come to a device with one sum, 64 tokens of Pro; with more XLA's is as fast
# (benchmarks/LOG.md).
MAX_ARRIVING = 64 * 6144


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exchange:
    """What `all_reduce` of one group of axes needs, on every device.

    Kernels write into it, which XLA doesn't know: it is an argument of programs that is never
    donated, so that it stays where it is.  Two sums that use it must depend on each other, so that
    every device has them in the same order.

    Attributes:
      words: uint32 [devices, `size`]; inside `shard_map` a device's own, [1, `size`].  Values with
        the number of their sum beside each, for every second sum in the same place, from each
        device; then counters of sums, one a block.
      axes: of the mesh; those of more than one device.
      values: how many a sum may have.
    """

    words: Any
    axes: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    values: int = dataclasses.field(metadata={"static": True})


def size(devices: int, values: int) -> int:
    """Words that a device needs for sums of so many values of so many devices."""
    return 2 * devices * 2 * values + values // BLOCK


def most_values(devices: int) -> int:
    """How many values a sum of so many devices, two at least, may have to be faster than XLA's."""
    return MAX_ARRIVING // (devices - 1)


def group_size(mesh: Any, axes: tuple[str, ...]) -> int:
    """How many devices add up over the axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


def why_not(mesh: Any, axes: tuple[str, ...]) -> str | None:
    """Why devices can't add up over these axes so; None if they can."""
    devices = mesh.devices.flat
    target = Target.of(devices[0])
    group = group_size(mesh, axes)
    if target.platform != "cuda" or target.capability != 90:
        return backends.why_not("mosaic_gpu", target) or f"{target.kind} is not a Hopper GPU"
    if not 2 <= group <= MAX_DEVICES:
        return f"{group} devices add up, and the kernel is for 2 to {MAX_DEVICES}"
    if jax.process_count() > 1:
        return "devices of other processes have addresses of their own"
    if [d.id for d in devices] != list(range(mesh.size)):
        return "Mosaic GPU takes the mesh's devices to be numbered from 0 in its order"
    return None


def abstract(mesh: Mesh, axes: tuple[str, ...], values: int) -> Exchange:
    """An exchange as shapes.

    Args:
      mesh: of GPUs that reach each other's memory.
      axes: of the mesh, which sums go over.
      values: that a sum may have; rounded up to whole blocks.
    """
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    values = -(-values // BLOCK) * BLOCK
    shape = (mesh.size, size(group_size(mesh, axes), values))
    placed = NamedSharding(mesh, P(mesh.axis_names))
    return Exchange(jax.ShapeDtypeStruct(shape, jnp.uint32, sharding=placed), axes, values)


def on(mesh: Mesh, axes: tuple[str, ...], values: int) -> Exchange:
    """An exchange that nothing has gone through; the arguments are those of `abstract`."""
    exchange = abstract(mesh, axes, values)
    like = exchange.words
    zeros = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)
    return dataclasses.replace(exchange, words=zeros())
