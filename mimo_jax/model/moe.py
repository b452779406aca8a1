"""Mixture of experts with a sigmoid router (MODEL_SPEC 2.12), in plain jnp.

Only the experts that tokens are routed to are computed: a few (token, expert) pairs gather their
experts' weights; many are sorted into tiles of rows that share an expert.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mimo_jax.config import MiMoConfig
from mimo_jax.model.layers import contract
from mimo_jax.model.parameters import Format, Make, ParamSpec, declare
from mimo_jax.model.taps import Taps
from mimo_jax.quant import dequantize

# Up to this many (token, expert) pairs, weights are gathered a pair; above, rows are tiled.
GATHER_PAIRS = 64
# Bytes of float32 expert weights to dequantise at a time.
TILE_BYTES = 128 * 2**20


def route(
    scores: Float[Array, "P E"],
    bias: Float[Array, " E"],
    top_k: int,
    *,
    normalize: bool,
    scale: float | None,
) -> tuple[Float[Array, "P X"], Int[Array, "P X"]]:
    """Mixing weights and indices of each token's experts.

    The bias takes part in choosing the experts and not in mixing them (MODEL_SPEC 2.12).

    Args:
      scores: sigmoid router outputs, float32.
      bias: `e_score_correction_bias`.
      top_k: experts a token.
      normalize: divide the chosen scores by their sum.
      scale: routed_scaling_factor, None for 1.
    """
    _, chosen = jax.lax.top_k(scores + bias, top_k)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return weights if scale is None else weights * scale, chosen


def swiglu_experts(
    x: Float[Array, "G R D"], expert: Int[Array, " G"], gate: Any, up: Any, down: Any
) -> Float[Array, "G R D"]:
    """Applies expert[g] to the R rows x[g]; weights are dense or quantised stacks of E experts."""

    def weights(stack: Any) -> Array:
        return dequantize(jax.tree.map(lambda a: a[expert], stack), x.dtype)

    g = contract("grd,gfd->grf", x, weights(gate)).astype(x.dtype)
    u = contract("grd,gfd->grf", x, weights(up)).astype(x.dtype)
    return contract("grf,gdf->grd", jax.nn.silu(g) * u, weights(down)).astype(x.dtype)


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
      weights, chosen: mixing weights and expert indices from `route`.
      gate, up: expert weights [E, F, D], plain or quantised.
      down: expert weights [E, D, F].
    """
    tokens, top_k = chosen.shape
    pairs = tokens * top_k
    if pairs <= GATHER_PAIRS:
        rows = jnp.repeat(x, top_k, axis=0)[:, None, :]
        y = swiglu_experts(rows, chosen.reshape(-1), gate, up, down)[:, 0]
    else:
        y = _tiled_experts(x, chosen, gate, up, down)
    y = y.reshape(tokens, top_k, -1).astype(jnp.float32)
    return (weights[..., None] * y).sum(axis=1).astype(x.dtype)


def _tiled_experts(
    x: Float[Array, "P D"], chosen: Int[Array, "P X"], gate: Any, up: Any, down: Any
) -> Float[Array, "pairs D"]:
    """Expert outputs of every (token, expert) pair, by tiles of rows that share an expert."""
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
    return y.at[slot].get(unique_indices=True, mode="promise_in_bounds")


def _tile_rows(pairs: int, n_experts: int) -> int:
    """Rows a tile: near the average group, so that little is padded, and a power of two."""
    average = max(1, pairs // n_experts)
    return min(1024, max(8, 1 << (average - 1).bit_length()))


class MoE(nnx.Module):
    """The routed feed-forward of one decoder layer; no shared expert, no token dropping."""

    def __init__(self, config: MiMoConfig, index: int, name: str, fmt: Format, make: Make):
        self.index = index
        self.top_k = config.num_experts_per_tok
        self.normalize = config.norm_topk_prob
        self.scale = config.routed_scaling_factor
        e, f, d = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        router_dtype = "bfloat16" if config.moe_router_dtype == "bfloat16" else "float32"
        self.gate = declare(
            make, ParamSpec(f"{name}.gate.weight", (e, d), ("expert", "embed"), dtype=router_dtype)
        )
        self.e_score_correction_bias = declare(
            make,
            ParamSpec(
                f"{name}.gate.e_score_correction_bias",
                (e,),
                ("expert",),
                init="zeros",
                dtype="float32",
            ),
        )

        def experts(projection: str, out: int, in_: int, axes: tuple[str, str]) -> nnx.Param:
            spec = ParamSpec(
                f"{name}.experts.{{}}.{projection}.weight",
                (e, out, in_),
                ("expert", *axes),
                format=fmt,
            )
            return declare(make, spec)

        self.gate_proj = experts("gate_proj", f, d, ("expert_mlp", "embed"))
        self.up_proj = experts("up_proj", f, d, ("expert_mlp", "embed"))
        self.down_proj = experts("down_proj", d, f, ("embed", "expert_mlp"))

    def __call__(self, x: Float[Array, "B T D"], taps: Taps) -> Float[Array, "B T D"]:
        """Routes each token in float32 and sums its experts."""
        logits = contract("btd,ed->bte", x.astype(jnp.float32), self.gate[...].astype(jnp.float32))
        scores = jax.nn.sigmoid(logits)
        taps.record(f"router.{self.index}", scores)
        weights, chosen = route(
            scores.reshape(-1, scores.shape[-1]),
            self.e_score_correction_bias[...],
            self.top_k,
            normalize=self.normalize,
            scale=self.scale,
        )
        taps.record(f"experts.{self.index}", chosen.reshape(*x.shape[:-1], -1))
        y = moe(
            x.reshape(-1, x.shape[-1]),
            weights,
            chosen,
            self.gate_proj.get_value(),
            self.up_proj.get_value(),
            self.down_proj.get_value(),
        )
        return y.reshape(x.shape)
