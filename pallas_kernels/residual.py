"""Adding to a residual stream."""

from __future__ import annotations

from jaxtyping import Array, Float


def added(residual: Float[Array, "*b D"], y: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
    """residual + y, which is first rounded to the residual's dtype, as transformers does.

    Kernels that do it with something else may round the sum only.
    """
    return residual + y.astype(residual.dtype)
