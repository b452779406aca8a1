"""Products with quantised weights, in plain jnp: the definition of the operation."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels.dequantize import dequantize
from pallas_kernels.einsum import einsum32


def quantized_matmul(x: Float[Array, "T D"], w: Any) -> Float[Array, "T ..."]:
    """x W^T; the weights are rounded to x's dtype, products are summed in float32.

    Args:
      x: activations.
      w: weights [F, D], or [C, R, D] whose product ends in C, R; dense or quantised.

    Returns:
      In x's dtype.
    """
    dense = dequantize(w, x.dtype)
    equation = "td,fd->tf" if dense.ndim == 2 else "td,crd->tcr"
    return einsum32(equation, x, dense).astype(x.dtype)
