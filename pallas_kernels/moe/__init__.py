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
from pallas_kernels.residual import added
from pallas_kernels.rms_norm import rms_norm

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
NORMED_SCORES = (
    Implementation("triton", triton_scores.unsupported_normed, triton_scores.normed_scores),
)
ROUTES = (
    Implementation("triton", triton_route.unsupported, triton_route.route),
    Implementation(REFERENCE, lambda *_: None, reference.route),
)
# From the scores on; elsewhere it is what it consists of, one after the other.
ROUTED = (Implementation("triton", triton_one.unsupported_routed, triton_one.routed_moe),)


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


def normed_scores(
    x: Float[Array, "*b D"],
    weight: Float[Array, " D"],
    router: Float[Array, "E D"],
    *,
    eps: float,
    kernels: Sequence[str] = (REFERENCE,),
) -> tuple[Float[Array, "*b D"], Float[Array, "*b E"]]:
    """Normalised tokens and their `scores`; one kernel for one token on GPUs.

    Args:
      x: tokens.
      weight, eps: of the norm, as for `pallas_kernels.rms_norm.rms_norm`.
      router: its weights.
      kernels: backends that may be used; the reference is used where none of them has this.
    """
    flat = _flat(x)
    if backends.choose(NORMED_SCORES, kernels, flat, router)[0] is not None:
        case = ("normed_scores", NORMED_SCORES, kernels, (flat, router))
        y, of_all = backends.call(*case, flat, weight, router, eps=eps)
        y = y.reshape(x.shape)
    else:
        y = rms_norm(x, weight, eps=eps, kernels=kernels)
        of_all = scores(_flat(y), router, kernels=kernels)
    return y, of_all.reshape(*x.shape[:-1], -1)


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


def routed_moe(
    x: Float[Array, "*b D"],
    scores: Float[Array, "*b E"],
    bias: Float[Array, " E"],
    gate: Any,
    up: Any,
    down: Any,
    *,
    top_k: int,
    normalize: bool,
    scale: float | None,
    first: Int[Array, ""] | None = None,
    residual: Float[Array, "*b D"] | None = None,
) -> tuple[Float[Array, "*b D"], Float[Array, "*b X"], Int[Array, "*b X"]]:
    """`route` and `moe` of scores; for one token on GPUs in two kernels.

    Args:
      x: tokens.
      scores: their router scores, of all experts.
      bias, top_k, normalize, scale: as for `route`.
      gate, up, down: as for `moe`.
      first: index of the first of the experts whose weights are here, 0 by default.
      residual: what the result is `added` to.

    Returns:
      The experts' sum, float32 without a residual; and what `route` gives.

    Raises:
      NotImplementedError: as `moe`.
    """
    kernels = backends.kernels_of(gate)
    options = {"top_k": top_k, "normalize": normalize, "scale": scale}
    flat, of_all, experts = _flat(x), _flat(scores), (gate, up, down)
    case = (flat, of_all, gate)
    if backends.choose(ROUTED, kernels, *case)[0] is not None:
        to = None if residual is None else _flat(residual)
        given = (flat, of_all, bias, first, to, *experts)
        y, weights, chosen = backends.call("moe", ROUTED, kernels, case, *given, **options)
        y = y.reshape(x.shape)
    else:
        weights, chosen = route(of_all, bias, **options, kernels=kernels)
        y = moe(flat, weights, chosen if first is None else chosen - first, *experts)
        y = y.reshape(x.shape)
        # The residual keeps its shape: where each layer reshapes it to add to it, XLA compiles for
        # CPUs practically for ever.
        y = y if residual is None else added(residual, y)
    weights, chosen = (a.reshape(*x.shape[:-1], -1) for a in (weights, chosen))
    return y, weights, chosen


def _flat(x: Float[Array, "*b _"]) -> Float[Array, "P _"]:
    return x.reshape(-1, x.shape[-1])
