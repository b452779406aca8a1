"""Products of activations with quantised weights."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.quantized_matmul import mosaic_tpu, reference, triton, triton_one

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("triton", triton_one.unsupported, triton_one.quantized_matmul),
    Implementation("triton", triton.unsupported, triton.quantized_matmul),
    Implementation("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.quantized_matmul),
    Implementation(REFERENCE, lambda *_: None, reference.quantized_matmul),
)


def quantized_matmul(x: Float[Array, "T D"], w: Any) -> Float[Array, "T ..."]:
    """x W^T; `reference.quantized_matmul` defines it.

    There is no gradient through the kernels.

    Args:
      x: activations.
      w: weights [F, D], or [C, R, D] whose product ends in C, R; dense, quantised or packed.

    Returns:
      In x's dtype.

    Raises:
      NotImplementedError: the weights are packed for kernels that can't do this.
    """
    allowed = backends.kernels_of(w)
    return backends.call("quantized_matmul", IMPLEMENTATIONS, allowed, (x, w), x, w)
