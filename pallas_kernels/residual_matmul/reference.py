"""A product added to a residual stream, in plain jnp: the definition of the operation."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.einsum import einsum32
from pallas_kernels.residual import added


def residual_matmul(
    x: Float[Array, "T F"], w: Float[Array, "D F"], residual: Float[Array, "T D"] | None = None
) -> Float[Array, "T D"]:
    """x W^T, summed in float32, `added` to the residual; without a residual float32, so that parts
    of the sum that are elsewhere can be added to it."""
    y = einsum32("tf,df->td", x, w)
    return y if residual is None else added(residual, y)
