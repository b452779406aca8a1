"""Linear maps with weights that were packed for kernels, on any mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.packed import Packed
from pallas_kernels.quantized_matmul import quantized_matmul
from sharding.types import axes_of, entries, explicit_mesh


def packed_linear(x: Float[Array, "*b D"], w: Packed) -> Float[Array, "*b *F"]:
    """x W^T; each device multiplies with its part, and parts of columns are added up.

    x is split in its last dimension as the columns of W are.
    """

    def local(x: Array, w: Packed) -> Array:
        y = quantized_matmul(x.reshape(-1, x.shape[-1]), w)
        return y.reshape(*x.shape[:-1], *y.shape[1:])

    if explicit_mesh(x) is None:
        return local(x, w)
    split = entries(w.words)
    lead, rows, columns = split[: w.ndim - 2], split[w.ROW_AXIS], split[w.COLUMN_AXIS]
    tokens, summed = entries(x)[:-1], axes_of(columns)

    def partial(x: Array, w: Packed) -> Array:
        y = local(x, w)
        return jax.lax.psum(y, summed) if summed else y

    return jax.shard_map(
        partial,
        in_specs=(P(*tokens, columns), jax.tree.map(lambda a: P(*entries(a)), w)),
        out_specs=P(*tokens, *lead, rows),
        check_vma=False,  # kernels are not typed by what varies
    )(x, w)
