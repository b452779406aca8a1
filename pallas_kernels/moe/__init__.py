"""A mixture of experts: routing, dispatch, SwiGLU experts on quantised weights, combination."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels.moe import reference
from pallas_kernels.moe.reference import route as route


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: Any,
    up: Any,
    down: Any,
) -> Float[Array, "P D"]:
    """Sum of each token's experts; see `reference.moe`."""
    return reference.moe(x, weights, chosen, gate, up, down)
