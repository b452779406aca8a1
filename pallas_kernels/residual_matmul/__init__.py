"""A product with dense weights, added to a residual stream."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.residual_matmul import reference, triton

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("triton", triton.unsupported, triton.residual_matmul),
    Implementation(REFERENCE, lambda *_: None, reference.residual_matmul),
)


def residual_matmul(
    x: Float[Array, "T F"],
    w: Float[Array, "D F"],
    residual: Float[Array, "T D"] | None = None,
    *,
    kernels: Sequence[str] = (REFERENCE,),
) -> Float[Array, "T D"]:
    """residual + x W^T; `reference.residual_matmul` defines it.

    Args:
      x: activations.
      w: dense weights.
      residual: what the product is added to, if anything.
      kernels: backends that may be used; the reference is used where none of them has this.

    Returns:
      In residual's dtype; float32 without one.

    Raises:
      NotImplementedError: differentiating a kernel.
    """
    allowed = (*kernels, REFERENCE)
    return backends.call("residual_matmul", IMPLEMENTATIONS, allowed, (x, w), x, w, residual)
