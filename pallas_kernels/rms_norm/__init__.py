"""Root-mean-square norm."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.rms_norm import reference, triton

# Preferred first.
IMPLEMENTATIONS = (
    Implementation("triton", triton.unsupported, triton.rms_norm),
    Implementation(REFERENCE, lambda *_: None, reference.rms_norm),
)


def rms_norm(
    x: Float[Array, "*b D"],
    weight: Float[Array, " D"],
    *,
    eps: float,
    kernels: Sequence[str] = (REFERENCE,),
) -> Float[Array, "*b D"]:
    """Normalises the last dimension; `reference.rms_norm` defines it.

    Args:
      x: what is normalised.
      weight: what the result is multiplied by.
      eps: what is added to the mean square.
      kernels: backends that may be used; the reference is used where none of them has this.

    Raises:
      NotImplementedError: differentiating a kernel.
    """
    allowed = (*kernels, REFERENCE)
    return backends.call("rms_norm", IMPLEMENTATIONS, allowed, (x,), x, weight, eps=eps)
