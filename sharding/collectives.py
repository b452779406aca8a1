"""Exchange of rows between the devices of mesh axes, for expert-parallel mixtures of experts.

Called inside `jax.shard_map`.  `dispatch` sends each local token to the devices that hold its
experts, `combine` brings the results back and adds them up:

    received, valid, route = dispatch((x, weights, chosen), wanted, "expert", ragged=False)
    y = experts_that_live_here(*received, valid)
    x = combine(y, route)

Every device has P tokens and sees n devices, itself included.  Buffers hold n blocks of P rows, a
block for each device: the rows for (or from) it in the order of the tokens, then rows that aren't
valid.  A block holds all tokens that one device can send to another, so none is ever dropped.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped, UInt

# One mesh axis, or several taken together: ("data", "expert") counts devices row by row.
Axis = str | tuple[str, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot", "sent", "received"],
    meta_fields=["axis", "ragged"],
)
@dataclasses.dataclass(frozen=True)
class Route:
    """Where a dispatch's rows went, for the way back.

    Attributes:
      slot: int32, [d, p] is the row of the send buffer that took token p to device d, or n*P.
      sent: int32, rows sent to each device.
      received: int32, rows received from each device.
      axis: as given to `dispatch`.
      ragged: as given to `dispatch`.
    """

    slot: Int[Array, "n P"]
    sent: Int[Array, " n"]
    received: Int[Array, " n"]
    axis: Axis
    ragged: bool


def supports_ragged(platform: str) -> bool:
    """Whether XLA compiles `jax.lax.ragged_all_to_all` for a platform.

    Args:
      platform: of a device ("cpu", "gpu", "tpu") or of a lowering ("cuda", "rocm").
    """
    # XLA:CPU (jaxlib 0.11.2) lowers it and raises UNIMPLEMENTED when it compiles.
    return platform in ("gpu", "cuda", "rocm", "tpu")


def prefers_ragged(platform: str) -> bool:
    """Whether the ragged exchange is the faster one on a platform, as far as is known.

    On two H200s (jax 0.11.2) it is 1.2 to 62 times slower than the padded one: 37 ms against
    0.6 for 4096 tokens (scripts/bench_exchange.py).  On TPUs it has not been timed.
    """
    return platform == "tpu"


def dispatch(
    tree: PyTree[Shaped[Array, "P ..."]], wanted: Bool[Array, "P n"], axis: Axis, *, ragged: bool
) -> tuple[PyTree[Shaped[Array, "n*P ..."]], Bool[Array, " n*P"], Route]:
    """Sends each token to the devices that want it, once to each.

    Two collectives, however many leaves the tree has: an all-gather of row counts and the exchange.
    The rows travel as unsigned integers, so there is no gradient.

    Args:
      tree: arrays of the P local tokens, of any dtypes of whole bytes.
      wanted: the devices of `axis` that each token goes to: any number of them, or none.
      axis: the mesh axis or axes to exchange over.
      ragged: send the rows that exist (`supports_ragged`), instead of P rows to each device.

    Returns:
      The arrays of the tokens received, block s from device s; which of their rows are valid, the
      others being zero; and the route for `combine`.

    Raises:
      ValueError: if the leading dimensions disagree with each other or with the axis.
    """
    n = jax.lax.axis_size(axis)
    n_tokens = wanted.shape[0]
    _check(tree, wanted, axis)
    rows, tree_of = _as_rows(tree)

    sent = wanted.sum(axis=0, dtype=jnp.int32)
    received = jax.lax.all_gather(sent, axis)[:, jax.lax.axis_index(axis)]
    row = jnp.arange(n_tokens, dtype=jnp.int32)
    device = jnp.arange(n, dtype=jnp.int32)[:, None]
    # For each device the tokens that go there in their order, then distinct indices out of bounds.
    token = jnp.sort(jnp.where(wanted.T, row, n_tokens + row), axis=1, stable=False)
    send = rows.at[token.reshape(-1)].get(mode="fill", fill_value=0)
    # A scatter, not the cumulative sum of `wanted`: XLA computes that again for each element that
    # `combine` reads (jaxlib 0.11.2, compiled for H100).
    slot = jnp.full((n, n_tokens), n * n_tokens, jnp.int32)
    slot = slot.at[device, token].set(device * n_tokens + row, mode="drop", unique_indices=True)
    route = Route(slot, sent, received, axis, ragged)
    valid = (row < received[:, None]).reshape(-1)
    return tree_of(_exchange(send, sent, received, route)), valid, route


def combine(y: Float[Array, "R F"], route: Route) -> Float[Array, "P F"]:
    """Sends each received row's result back and sums them for each token.

    Each token's results are gathered from known rows, without atomic additions, and added in the
    order of the devices, in float32 or y's dtype where that is wider.

    Args:
      y: a result for each row that `dispatch` returned; rows that aren't valid are never read.
      route: from `dispatch`.

    Returns:
      The sums in y's dtype; zero for a token that went nowhere.

    Raises:
      ValueError: if y hasn't the rows that `dispatch` returned.
    """
    if y.shape[0] != route.slot.size:
        raise ValueError(
            f"combine got results for {y.shape[0]} rows, but dispatch returned {route.slot.size}: "
            "pass one row for each of them, those that are not valid included."
        )
    back = _exchange(y, route.received, route.sent, route)
    terms = back.at[route.slot].get(mode="fill", fill_value=0)
    # One addition after the other: a reduction's order is the compiler's, and it is not the same in
    # all programs (seen on XLA:CPU).  XLA:GPU makes one loop of gather and additions.
    terms = terms.astype(jnp.promote_types(y.dtype, jnp.float32))
    return functools.reduce(operator.add, list(terms)).astype(y.dtype)


def _exchange(
    rows: Shaped[Array, "R W"], sent: Int[Array, " n"], received: Int[Array, " n"], route: Route
) -> Shaped[Array, "R W"]:
    """Sends block d of the rows to device d, where it becomes the block of this device.

    Ragged, only the first sent[d] rows of it travel and the rest arrives as zeros.
    """
    if not route.ragged:
        return jax.lax.all_to_all(rows, route.axis, 0, 0, tiled=True)
    block = rows.shape[0] // sent.size
    return jax.lax.ragged_all_to_all(
        rows,
        jnp.zeros_like(rows),
        input_offsets=block * jnp.arange(sent.size, dtype=jnp.int32),
        send_sizes=sent,
        # Offsets in the receivers' buffers: in all of them, the block of this device.
        output_offsets=jnp.full_like(sent, block * jax.lax.axis_index(route.axis)),
        recv_sizes=received,
        axis_name=route.axis,
    )


def _as_rows(
    tree: PyTree[Shaped[Array, "P ..."]],
) -> tuple[UInt[Array, "P W"], Callable[[UInt[Array, "R W"]], Any]]:
    """One row of unsigned integers a token, and the function that turns such rows into the tree.

    One collective instead of one a leaf: each costs about 20 us whatever its size (all-reduce of
    12 kB over four H200s), and XLA:GPU makes the concatenation part of the gather that fills the
    send buffer.  Integers, because an id's bits as a float may be a denormal, which may be lost.
    """
    leaves, structure = jax.tree.flatten(tree)
    # The narrowest dtype is the unit: tokens in bfloat16 with float32 weights become uint16.
    unit = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize for leaf in leaves)}")
    parts = [leaf.reshape(leaf.shape[0], -1).view(unit) for leaf in leaves]
    widths = [part.shape[1] for part in parts]

    def tree_of(rows: UInt[Array, "R W"]) -> Any:
        parts, start = [], 0
        for leaf, width in zip(leaves, widths):
            part = rows[:, start : start + width].view(leaf.dtype)
            parts.append(part.reshape(rows.shape[0], *leaf.shape[1:]))
            start += width
        return jax.tree.unflatten(structure, parts)

    return jnp.concatenate(parts, axis=1), tree_of


def _check(tree: PyTree[Array], wanted: Array, axis: Axis) -> None:
    n, n_tokens = jax.lax.axis_size(axis), wanted.shape[0]
    if wanted.ndim != 2 or wanted.shape[1] != n or wanted.dtype != jnp.bool_:
        raise ValueError(
            f"wanted is {wanted.dtype}{list(wanted.shape)}, but the mesh axis {axis!r} has {n} "
            f"devices: pass bool[tokens, {n}]."
        )
    for path, leaf in jax.tree.leaves_with_path(tree):
        if leaf.shape[:1] != (n_tokens,):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"Array {name} to dispatch has shape {list(leaf.shape)}, but wanted has a row for "
                f"each of {n_tokens} tokens: give both the same leading dimension."
            )
