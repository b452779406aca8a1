"""Attention of new tokens over a layer's cache, on any mesh: a device has some rows and heads.

Few tokens look at the cache as it lies, after their own keys and values have been written to it.
Many tokens need keys in the order of their positions, which a full layer's cache has by itself; of
a ring, in which so many tokens overwrite what the first of them still have to see, the window that
precedes them is put before their own keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from mimo_jax.model.cache import LayerCache
from pallas_kernels.attention import attention
from pallas_kernels.attention.reference import attend, visible
from pallas_kernels.backends import REFERENCE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_attention.reference import MAX_QUERIES, visible_slots
from sharding.types import entries, explicit_mesh


def cached_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    positions: Int[Array, "B T"],
    before: LayerCache | None,
    after: LayerCache | None,
    sink: Float[Array, "K G"] | None,
    *,
    window: int | None,
    kernels: Sequence[str] = (REFERENCE,),
    with_weights: bool = False,
) -> tuple[Float[Array, "B T K G V"], Float[Array, "B K G T S"] | None]:
    """Causal softmax attention over what the cache holds and the tokens themselves.

    Args:
      q, k, v: of the tokens; G query heads for each KV head.
      positions: increasing by one along a row, and negative for padding at its ends.
      before, after: the layer's cache without and with the tokens; None if they are all there is.
      sink: a logit a query head that takes part in the normaliser (MODEL_SPEC 2.9).
      window: positions that a token sees, its own included, and the cache is a ring; None for all.
      kernels: backends that may be used.
      with_weights: whether to return the weights too, which are then computed in plain jnp.

    Returns:
      The output in q's dtype (undefined for padding), and float32 weights over the S keys that were
      looked at, or None.
    """

    def local(q: Array, k: Array, v: Array, positions: Array, *held: Any) -> tuple[Array, Any]:
        before, after, sink = held
        operation: Callable[..., Array]
        seen: Callable[..., Array]
        if after is not None and _looks_at_slots(k, after, window):
            keys, values, rows = after.k, after.v, (positions,)
            operation, seen = decode_attention, visible_slots
        else:
            keys, values, rows = _in_order(k, v, positions, before, after, window)
            operation, seen = attention, visible
        if with_weights:
            sizes = (q.shape[1], keys.shape[1])
            return attend(q, keys, values, seen(*rows, sizes, window=window), sink)
        return operation(q, keys, values, *rows, sink=sink, window=window, kernels=kernels), None

    arrays = (q, k, v, positions, before, after, sink)
    if explicit_mesh(q) is None:
        return local(*arrays)
    batch, tokens, *heads = entries(q)[:4]
    return jax.shard_map(
        local,
        in_specs=jax.tree.map(lambda a: P(*entries(a)), arrays),
        out_specs=(P(batch, tokens, *heads), P(batch, *heads) if with_weights else None),
        check_vma=False,  # kernels are not typed by what varies
    )(*arrays)


def _looks_at_slots(k: Array, cache: LayerCache, window: int | None) -> bool:
    t, slots = k.shape[1], cache.k.shape[1]
    return t <= MAX_QUERIES and (window is None or window + t - 1 <= slots)


def _in_order(
    k: Array,
    v: Array,
    positions: Int[Array, "B T"],
    before: LayerCache | None,
    after: LayerCache | None,
    window: int | None,
) -> tuple[Array, Array, tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]]:
    """Successive keys and values, and the positions of the first token, first key and last token.

    The first of T tokens may be padding: what position it would have is negative or another's.
    """
    there = positions >= 0
    padding = jnp.argmax(there, axis=1).astype(positions.dtype)  # before a row's first token
    newest = positions.max(axis=1)
    first = newest - there.sum(axis=1, dtype=positions.dtype) + 1
    if before is None or after is None:
        # Counted from the first token, before which there is nothing to see.
        return k, v, (-padding, -padding, newest - first)
    if window is None:
        return after.k, after.v, (first - padding, jnp.zeros_like(first), newest)

    @jax.vmap
    def joined(ring: Array, own: Array, first: Array, padding: Array) -> Array:
        earlier = ring[(first - window + jnp.arange(window)) % ring.shape[0]]
        own = jnp.pad(own.astype(ring.dtype), ((window, 0), (0, 0), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(own, earlier, padding, 0)

    keys, values = (joined(*a, first, padding) for a in ((before.k, k), (before.v, v)))
    return keys, values, (first - padding, first - padding - window, newest)
