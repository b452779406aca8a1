"""The experts' computation on a mesh: each device has some experts, or a part of each one's width.

What happens follows from the shardings of tokens and weights alone.  Let E be the mesh axes that
split the experts, W those that split their width, and B those that split the tokens:

- axes of E in B: tokens travel to the devices that have their experts, and results back;
- axes of E not in B, and W: every device has all the tokens, computes what its part of the weights
  contributes, and the contributions are added up (one all-reduce).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.all_reduce import all_reduce
from pallas_kernels.all_reduce.exchange import Exchange
from pallas_kernels.backends import REFERENCE
from pallas_kernels.moe import moe, normed_scores, route, routed_moe
from pallas_kernels.residual import added
from sharding import collectives
from sharding.types import axes_of, entries, explicit_mesh, on_mesh


def experts_on_mesh(
    x: Float[Array, "B T D"],
    norm: Float[Array, " D"],
    router: Float[Array, "E D"],
    bias: Float[Array, " E"],
    gate: Any,
    up: Any,
    down: Any,
    *,
    eps: float,
    top_k: int,
    normalize: bool,
    scale: float | None,
    kernels: Sequence[str] = (REFERENCE,),
    exchange: Exchange | None = None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T E"], Int[Array, "B T X"]]:
    """Norm, routing and experts of a residual stream.

    Args:
      x: the residual stream; its tokens may be split over a mesh.
      norm, eps: weight of the norm and what it adds to the mean square.
      router, bias: on every device, as for `pallas_kernels.moe.route`.
      gate, up, down: as for `pallas_kernels.moe.moe`; they may be split over a mesh.
      top_k, normalize, scale: as for `pallas_kernels.moe.route`.
      kernels: backends that norm, routing and the sum over devices may use.
      exchange: what devices may add up through.

    Returns:
      The residual stream with the experts' sum added; scores of all experts (sigmoid); and indices
      of the chosen ones.
    """
    tokens = axes_of(entries(x)[0])
    held = entries(jax.tree.leaves(gate)[0])
    split, width = axes_of(held[0]), axes_of(held[getattr(gate, "ROW_AXIS", 1)])
    travel = tuple(a for a in split if a in tokens)
    summed = tuple(a for a in (*split, *width) if a not in tokens)
    ragged = bool(travel) and collectives.prefers_ragged(_platform(explicit_mesh(x)))
    options = {"top_k": top_k, "normalize": normalize, "scale": scale}

    def local(
        x: Array,
        norm: Array,
        router: Array,
        bias: Array,
        experts: tuple[Any, Any, Any],
        exchange: Exchange | None,
    ) -> tuple[Array, Array, Array]:
        normed, of_all = normed_scores(x, norm, router, eps=eps, kernels=kernels)
        if travel:
            flat, of_each = (a.reshape(-1, a.shape[-1]) for a in (normed, of_all))
            weights, chosen = route(of_each, bias, **options, kernels=kernels)
            y = _travelling(
                flat, weights, chosen, *experts, split=split, travel=travel, ragged=ragged
            ).reshape(x.shape)
            chosen = chosen.reshape(*x.shape[:-1], -1)
        else:
            y, _, chosen = routed_moe(
                *(normed, of_all, bias, *experts),
                **options,
                first=_first_expert(experts[0], split) if split else None,
                residual=None if summed else x,
            )
        if summed:
            y = all_reduce(y, x, exchange, axes=summed, kernels=kernels)
        elif travel:
            y = added(x, y)
        return y, of_all, chosen

    # XLA does not split its top-k by itself: it would bring all tokens to every device.
    rows = P(entries(x)[0])
    arrays = (x, norm, router, bias, (gate, up, down), exchange)
    return on_mesh(local, (P(*entries(x)), rows, rows), *arrays)


def _travelling(
    x: Array,
    weights: Array,
    chosen: Array,
    gate: Any,
    up: Any,
    down: Any,
    *,
    split: tuple[str, ...],
    travel: tuple[str, ...],
    ragged: bool,
) -> Array:
    """What the experts on the devices along `travel` make of this device's tokens."""
    wanted = _destinations(chosen // gate.shape[0], split, travel)
    (x_in, weights_in, chosen_in), valid, route = collectives.dispatch(
        (x, weights, chosen), wanted, travel, ragged=ragged
    )
    mine = jnp.where(valid[:, None], chosen_in - _first_expert(gate, split), -1)
    y = moe(x_in, weights_in, mine, gate, up, down)
    return collectives.combine(y, route)


def _first_expert(gate: Any, split: tuple[str, ...]) -> Int[Array, ""]:
    """The index of the first of this device's experts."""
    return gate.shape[0] * jax.lax.axis_index(split)


def _destinations(
    owner: Int[Array, "P X"], split: tuple[str, ...], travel: tuple[str, ...]
) -> Bool[Array, "P n"]:
    """Which devices along `travel` each token has to visit.

    Args:
      owner: of each chosen expert, the position along the axes of `split` together.
      split: axes that split the experts, the last one fastest.
      travel: those of them that tokens travel along.
    """
    place, rest, stride = jnp.zeros_like(owner), owner, 1
    for axis in reversed(split):
        n = jax.lax.axis_size(axis)
        if axis in travel:
            place, stride = place + stride * (rest % n), stride * n
        rest = rest // n
    return (place[:, :, None] == jnp.arange(stride)).any(axis=1)


def _platform(mesh: Any) -> str:
    device = getattr(mesh, "abstract_device", None)
    return jax.default_backend() if device is None else device.platform
