"""What devices have computed of a product, added up over a mesh's axes and to a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels import backends
from pallas_kernels.all_reduce import exchange as exchanges
from pallas_kernels.all_reduce import mosaic_gpu, reference
from pallas_kernels.all_reduce.exchange import BLOCK, Exchange
from pallas_kernels.backends import REFERENCE, Implementation

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("mosaic_gpu", mosaic_gpu.unsupported, mosaic_gpu.all_reduce),
    Implementation(REFERENCE, lambda *_: None, reference.all_reduce),
)


def all_reduce(
    y: Float[Array, "*b D"],
    residual: Float[Array, "*b D"],
    exchange: Exchange | None = None,
    *,
    axes: tuple[str, ...],
    kernels: Sequence[str] = (REFERENCE,),
) -> Float[Array, "*b D"]:
    """residual + the sum of y over the axes, inside `shard_map`; `reference.all_reduce` defines it.

    Args:
      y: this device's contribution.
      residual: what the sum is added to; the same on all devices of the axes.
      exchange: memory that other devices write into, if there is any
        (`pallas_kernels.all_reduce.exchange`); inside `shard_map`, this device's part.
      axes: of the mesh.
      kernels: backends that may be used; the reference is used where none of them has this.

    Returns:
      In residual's dtype; the same bits on all devices of the axes.

    Raises:
      NotImplementedError: differentiating a kernel.
    """
    case = (y, residual, exchange, axes)
    allowed = (*kernels, REFERENCE)
    args = (y, residual, exchange)
    return backends.call("all_reduce", IMPLEMENTATIONS, allowed, case, *args, axes=axes)


def tried_exchange(mesh: Mesh, axes: tuple[str, ...], values: int) -> Exchange:
    """An exchange through which three small sums have gone, to see that the devices can.

    Args:
      mesh, axes, values: as for `exchange.on`; `exchange.why_not` has no objection.

    Raises:
      jax.errors.JaxRuntimeError: devices don't reach each other's memory.
      RuntimeError: the sums are wrong.
    """
    exchange = exchanges.on(mesh, axes, values)

    def three(exchange: Exchange) -> Array:
        y = jnp.full(BLOCK, 1.0 + lax.axis_index(exchange.axes))
        total = jnp.zeros(BLOCK, jnp.bfloat16)
        for _ in range(3):
            total = mosaic_gpu.all_reduce(y, total, exchange, axes=axes)
        return total

    each = P(mesh.axis_names)
    specs = {"in_specs": (jax.tree.map(lambda _: each, exchange),), "out_specs": each}
    sums = jax.jit(jax.shard_map(three, mesh=mesh, **specs, check_vma=False))(exchange)
    devices = exchanges.group_size(mesh, axes)
    if not (np.asarray(sums, np.float32) == 3 * devices * (devices + 1) / 2).all():
        raise RuntimeError("sums through the memory of other devices are wrong")
    return exchange
