"""A mixture of experts: routing, dispatch, SwiGLU experts on quantised weights, combination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from pallas_kernels.backends import REFERENCE, Implementation
from pallas_kernels.moe import reference, triton, triton_route

# Preferred first.  Few tokens: Triton is faster than Mosaic GPU; many: the other way round.
IMPLEMENTATIONS = (
    Implementation("triton", triton.unsupported, triton.moe),
    Implementation(REFERENCE, lambda *_: None, reference.moe),
)
ROUTES = (
    Implementation("triton", triton_route.unsupported, triton_route.route),
    Implementation(REFERENCE, lambda *_: None, reference.route),
)


def route(
    scores: Float[Array, "*b E"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
    kernels: Sequence[str] = (REFERENCE,),
) -> tuple[Float[Array, "*b X"], Int[Array, "*b X"]]:
    """Mixing weights and indices of each token's experts; see `reference.route`.

    Args:
      kernels: backends that may be used; the reference is used where none of them has this.
    """
    flat = scores.reshape(-1, scores.shape[-1])
    weights, chosen = backends.call(
        "route",
        ROUTES,
        (*kernels, REFERENCE),
        (flat,),
        flat,
        bias,
        top_k,
        normalize=normalize,
        scale=scale,
    )
    shape = (*scores.shape[:-1], top_k)
    return weights.reshape(shape), chosen.reshape(shape)


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: Any,
    up: Any,
    down: Any,
) -> Float[Array, "P D"]:
    """Sum of each token's experts, weighted in float32; `reference.moe` defines it.

    There is no gradient through the kernels.

    Args:
      x: tokens.
      weights, chosen: mixing weights and expert indices from `route`.  Indices outside of 0..E-1
        are of experts that are elsewhere, and add nothing.
      gate, up: expert weights [E, F, D]: dense, quantised, or packed for kernels.
      down: expert weights [E, D, F].

    Raises:
      NotImplementedError: the weights are packed for kernels that can't do this.
    """
    case = (x, chosen, gate)
    allowed = backends.kernels_of(gate)
    return backends.call("moe", IMPLEMENTATIONS, allowed, case, x, weights, chosen, gate, up, down)
