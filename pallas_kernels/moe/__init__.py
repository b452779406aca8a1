"""A mixture of experts: routing, dispatch, SwiGLU experts on quantised weights, combination."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import backends
from pallas_kernels.backends import NAMES, REFERENCE, Implementation
from pallas_kernels.moe import (
    mosaic_gpu,
    mosaic_tpu,
    reference,
    split_scores,
    triton,
    triton_many,
    triton_one,
    triton_route,
    triton_scores,
)

# Preferred first.  Few tokens: Triton is faster than Mosaic GPU; many: the other way round.
IMPLEMENTATIONS = (
    Implementation("triton", triton_one.unsupported, triton_one.moe),
    Implementation("triton", triton.unsupported, triton.moe),
    Implementation("mosaic_gpu", mosaic_gpu.unsupported, mosaic_gpu.moe),
    Implementation("triton", triton_many.unsupported, triton_many.moe),
    Implementation("mosaic_tpu", mosaic_tpu.unsupported, mosaic_tpu.moe),
    Implementation(REFERENCE, lambda *_: None, reference.moe),
)
SCORES = (
    Implementation("triton", triton_scores.unsupported, triton_scores.scores),
    *(Implementation(name, split_scores.unsupported, split_scores.scores) for name in NAMES),
    Implementation(REFERENCE, lambda *_: None, reference.scores),
)
ROUTES = (
    Implementation("triton", triton_route.unsupported, triton_route.route),
    Implementation(REFERENCE, lambda *_: None, reference.route),
)


def scores(
    x: Float[Array, "P D"], router: Float[Array, "E D"], *, kernels: Sequence[str] = (REFERENCE,)
) -> Float[Array, "P E"]:
    """Sigmoid router outputs, float32; see `reference.scores`.

    Args:
      x: tokens.
      router: its weights.
      kernels: backends that may be used; the reference is used where none of them has this.
    """
    return backends.call("scores", SCORES, (*kernels, REFERENCE), (x, router), x, router)


def route(
    scores: Float[Array, "P E"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
    kernels: Sequence[str] = (REFERENCE,),
) -> tuple[Float[Array, "P X"], Int[Array, "P X"]]:
    """Mixing weights and indices of each token's experts.

    `reference.route` defines it and has the other arguments.

    Args:
      kernels: backends that may be used; the reference is used where none of them has this.
    """
    options = {"top_k": top_k, "normalize": normalize, "scale": scale}
    allowed = (*kernels, REFERENCE)
    return backends.call("route", ROUTES, allowed, (scores,), scores, bias, **options)


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
      weights: mixing weights from `route`.
      chosen: expert indices from `route`.  Those outside of 0..E-1 are of experts that are
        elsewhere, and add nothing.
      gate: expert weights [E, F, D]: dense, quantised, or packed for kernels.
      up: expert weights [E, F, D], likewise.
      down: expert weights [E, D, F].

    Raises:
      NotImplementedError: the weights are packed for kernels that can't do this.
    """
    case = (x, chosen, gate)
    allowed = backends.kernels_of(gate)
    return backends.call("moe", IMPLEMENTATIONS, allowed, case, x, weights, chosen, gate, up, down)
