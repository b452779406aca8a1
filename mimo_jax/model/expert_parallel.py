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

from pallas_kernels.backends import REFERENCE
from pallas_kernels.moe import moe, route, scores
from sharding import collectives
from sharding.types import axes_of, entries, explicit_mesh, on_mesh


def route_on_mesh(
    x: Float[Array, "B T D"],
    router: Float[Array, "E D"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
    kernels: Sequence[str] = (REFERENCE,),
) -> tuple[Float[Array, "B T E"], Float[Array, "B T X"], Int[Array, "B T X"]]:
    """Scores of all experts (sigmoid), and mixing weights and indices of the chosen ones.

    Tokens may be split over a mesh; the router is on every device.
    """

    def local(x: Array, router: Array, bias: Array) -> tuple[Array, Array, Array]:
        of_all = scores(x.reshape(-1, x.shape[-1]), router, kernels=kernels)
        chosen = route(of_all, bias, top_k, normalize=normalize, scale=scale, kernels=kernels)
        first, second, third = (a.reshape(*x.shape[:-1], -1) for a in (of_all, *chosen))
        return first, second, third

    # XLA does not split its top-k by itself: it would bring all tokens to every device.
    return on_mesh(local, P(entries(x)[0]), x, router, bias)


def moe_on_mesh(
    x: Float[Array, "B T D"],
    weights: Float[Array, "B T X"],
    chosen: Int[Array, "B T X"],
    gate: Any,
    up: Any,
    down: Any,
) -> Float[Array, "B T D"]:
    """`pallas_kernels.moe.moe` of tokens and weights that may be split over a mesh; float32."""
    mesh = explicit_mesh(x)
    if mesh is None:
        return _flat_moe(x, weights, chosen, gate, up, down)
    tokens = axes_of(entries(x)[0])
    held = entries(jax.tree.leaves(gate)[0])
    split, width = axes_of(held[0]), axes_of(held[getattr(gate, "ROW_AXIS", 1)])
    travel = tuple(a for a in split if a in tokens)
    summed = tuple(a for a in (*split, *width) if a not in tokens)
    ragged = collectives.prefers_ragged(_platform(mesh))

    def local(x: Array, weights: Array, chosen: Array, gate: Any, up: Any, down: Any) -> Array:
        if travel:
            y = _travelling(
                x, weights, chosen, gate, up, down, split=split, travel=travel, ragged=ragged
            )
        else:
            y = _flat_moe(x, weights, chosen - _first_expert(gate, split), gate, up, down)
        return jax.lax.psum(y, summed) if summed else y

    return on_mesh(local, P(*entries(x)), x, weights, chosen, gate, up, down)


def _flat_moe(x: Array, weights: Array, chosen: Array, gate: Any, up: Any, down: Any) -> Array:
    flat, weights, chosen = (a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen))
    return moe(flat, weights, chosen, gate, up, down).reshape(x.shape)


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
    flat = [a.reshape(-1, a.shape[-1]) for a in (x, weights, chosen)]
    wanted = _destinations(flat[2] // gate.shape[0], split, travel)
    (x_in, weights_in, chosen_in), valid, route = collectives.dispatch(
        tuple(flat), wanted, travel, ragged=ragged
    )
    mine = jnp.where(valid[:, None], chosen_in - _first_expert(gate, split), -1)
    y = moe(x_in, weights_in, mine, gate, up, down)
    return collectives.combine(y, route).reshape(x.shape)


def _first_expert(gate: Any, split: tuple[str, ...]) -> Int[Array, ""] | int:
    """The index of the first of this device's experts."""
    return gate.shape[0] * jax.lax.axis_index(split) if split else 0


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
