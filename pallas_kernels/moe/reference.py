"""Routing and expert computation of a mixture of experts in plain jnp: the definition of both.

Only the experts that tokens are routed to are computed: a few (token, expert) pairs gather their
experts' weights; many are sorted into tiles of rows that share an expert.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dequantize import dequantize
from pallas_kernels.einsum import einsum32

# Up to this many (token, expert) pairs, weights are gathered a pair; above, rows are tiled.
GATHER_PAIRS = 64
# Bytes of float32 expert weights to dequantise at a time.
TILE_BYTES = 128 * 2**20


def scores(x: Float[Array, "P D"], router: Float[Array, "E D"]) -> Float[Array, "P E"]:
    """Sigmoid of the router's outputs, all of it in float32."""
    x, router = x.astype(jnp.float32), router.astype(jnp.float32)
    return jax.nn.sigmoid(einsum32("pd,ed->pe", x, router))


def route(
    scores: Float[Array, "*b E"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
) -> tuple[Float[Array, "*b X"], Int[Array, "*b X"]]:
    """Mixing weights and indices of each token's experts.

    The bias takes part in choosing the experts and not in mixing them (DeepSeek-V3, section 2.1.2).

    Args:
      scores: sigmoid router outputs, float32.
      bias: of the selection.
      top_k: experts a token.
      normalize: divide the chosen scores by their sum.
      scale: factor of all weights, None for 1.
    """
    chosen = jax.lax.top_k(scores + bias, top_k)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        # One addition after the other: kernels add in this order too, and are equal bit for bit.
        total = functools.reduce(operator.add, jnp.split(weights, top_k, axis=-1))
        weights = weights / (total + 1e-20)
    return weights if scale is None else weights * scale, chosen


def swiglu_experts(
    x: Float[Array, "G R D"], expert: Int[Array, " G"], gate: Any, up: Any, down: Any
) -> Float[Array, "G R D"]:
    """Applies expert[g] to the R rows x[g]; weights are dense or quantised stacks of E experts."""

    def weights(stack: Any) -> Array:
        return dequantize(jax.tree.map(lambda a: a[expert], stack), x.dtype)

    g = einsum32("grd,gfd->grf", x, weights(gate)).astype(x.dtype)
    u = einsum32("grd,gfd->grf", x, weights(up)).astype(x.dtype)
    return einsum32("grf,gdf->grd", jax.nn.silu(g) * u, weights(down)).astype(x.dtype)


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: Any,
    up: Any,
    down: Any,
) -> Float[Array, "P D"]:
    """Sum of each token's experts, weighted in float32 (the definition of the operation).

    Args:
      x: tokens.
      weights: mixing weights from `route`.
      chosen: expert indices from `route`.  Those outside of 0..E-1 are of experts that are
        elsewhere, and add nothing.
      gate: expert weights [E, F, D], plain or quantised.
      up: expert weights [E, F, D], likewise.
      down: expert weights [E, D, F].

    Returns:
      float32, so that parts of the sum that are elsewhere can be added to it.
    """
    tokens, top_k = chosen.shape
    pairs = tokens * top_k
    here = (chosen >= 0) & (chosen < gate.shape[0])
    weights = jnp.where(here, weights, 0)
    if pairs <= GATHER_PAIRS:
        rows = jnp.repeat(x, top_k, axis=0)[:, None, :]
        y = swiglu_experts(rows, jnp.where(here, chosen, 0).reshape(-1), gate, up, down)[:, 0]
    else:
        chosen = jnp.where(here, chosen, gate.shape[0])
        y = _tiled_experts(x, chosen, gate, up, down)
    y = y.reshape(tokens, top_k, -1).astype(jnp.float32)
    return (weights[..., None] * y).sum(axis=1)


def _tiled_experts(
    x: Float[Array, "P D"], chosen: Int[Array, "P X"], gate: Any, up: Any, down: Any
) -> Float[Array, "pairs D"]:
    """Expert outputs of every (token, expert) pair, by tiles of rows that share an expert.

    Pairs of expert E have no expert and get zeros.
    """
    n_experts, width, dim = gate.shape
    tokens, top_k = chosen.shape
    pairs = tokens * top_k
    tile = _tile_rows(pairs, n_experts)
    n_tiles = pairs // tile + min(n_experts, pairs)

    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    by_expert = flat[order]
    first_pair = jnp.searchsorted(by_expert, jnp.arange(n_experts + 1)).astype(jnp.int32)
    tiles = -(-jnp.diff(first_pair) // tile)
    last_tile = jnp.cumsum(tiles)
    row = jnp.arange(pairs, dtype=jnp.int32) - first_pair[by_expert]
    slot_sorted = (last_tile - tiles)[by_expert] * tile + row
    nowhere = n_tiles * tile + jnp.arange(pairs, dtype=jnp.int32)
    slot_sorted = jnp.where(by_expert < n_experts, slot_sorted, nowhere)
    slot = jnp.zeros(pairs, jnp.int32).at[order].set(slot_sorted, unique_indices=True)

    # Every pair has a slot of its own.  Saying so (free slots get distinct indices out of bounds)
    # keeps the gradient's scatter from needing atomic additions.
    source = pairs + jnp.arange(n_tiles * tile, dtype=jnp.int32)
    source = source.at[slot].set(jnp.arange(pairs, dtype=jnp.int32), unique_indices=True)
    rows = jnp.repeat(x, top_k, axis=0)
    rows = rows.at[source].get(mode="fill", fill_value=0, unique_indices=True)
    rows = rows.reshape(n_tiles, tile, dim)
    expert = jnp.searchsorted(last_tile, jnp.arange(n_tiles), side="right")
    used = expert < n_experts

    def one_tile(args: tuple[Array, Array, Array]) -> Array:
        rows, expert, used = args
        return jax.lax.cond(
            used,
            lambda: swiglu_experts(rows[None], expert[None], gate, up, down)[0],
            lambda: jnp.zeros_like(rows),
        )

    at_once = max(1, min(n_tiles, TILE_BYTES // (3 * 4 * width * dim)))
    y = jax.lax.map(
        one_tile,
        (rows, jnp.minimum(expert, n_experts - 1), used),
        batch_size=at_once if at_once > 1 else None,
    )
    y = y.reshape(n_tiles * tile, dim)
    return y.at[slot].get(unique_indices=True, mode="fill", fill_value=0)


def _tile_rows(pairs: int, n_experts: int) -> int:
    """Rows a tile: near the average group, so that little is padded, and a power of two."""
    average = max(1, pairs // n_experts)
    return min(1024, max(8, 1 << (average - 1).bit_length()))
