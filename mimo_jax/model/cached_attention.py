"""Attention over a layer's cache, on any mesh: each device has some rows and some heads.

A few tokens are stored first and then look at the cache's slots as they lie.  Many tokens need keys
in the order of their positions, which a full layer's cache has by itself; of a ring, in which so
many overwrite what the first of them still have to see, the window that precedes them is put before
their own keys.
"""

from __future__ import annotations

import functools
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
from pallas_kernels.decode_attention.reference import refused, visible_slots
from pallas_kernels.rotate_and_store import Heads, rotate_and_store
from pallas_kernels.rotate_and_store.reference import (
    apply_rotary,
    rotary_angles,
    scaled,
    split,
    store,
)
from sharding.types import Entry, entries, on_mesh, reshard


def cached_attention(
    fused: Float[Array, "B T C R"],
    positions: Int[Array, "B T"],
    cache: LayerCache | None,
    sink: Float[Array, "K G"] | None,
    *,
    heads: Heads,
    window: int | None,
    group: Entry = None,
    kernels: Sequence[str] = (REFERENCE,),
    causal: bool = True,
    with_weights: bool = False,
) -> tuple[Float[Array, "B T K G V"], LayerCache | None, Float[Array, "B K G T S"] | None]:
    """Softmax attention over what a cache holds and the tokens themselves.

    Args:
      fused: the tokens' queries, keys and values as they were projected, in C chunks of rows.
      positions: increasing by one along a row, and negative for padding at its ends.
      cache: the layer's; None if the tokens are all there is.
      sink: a logit a query head that takes part in the normaliser.
      heads: what a chunk consists of.
      window: positions that a token sees, its own included, and the cache is a ring; None for all.
      group: mesh axes that share out the query heads of a KV head.
      kernels: backends that may be used.
      causal: tokens see no later ones.  Otherwise all see each other, which has to be a few tokens
        and a cache.
      with_weights: whether to return the weights too, which are then computed in plain jnp.

    Returns:
      The output in the dtype of `fused` (undefined for padding), the cache with the tokens in it,
      and float32 weights over the S keys that were looked at, or None.
    """
    ring, t = window is not None, fused.shape[1]
    rows = P(*entries(fused)[:3])
    look: Callable[..., Any]
    few = cache is not None and refused(t, cache.k.shape[1], window) is None
    if not few and not causal:
        raise ValueError(f"{t} tokens that see each other need a cache, and to be few")
    if cache is not None and (few or not ring):
        into = functools.partial(rotate_and_store, heads=heads, ring=ring, kernels=kernels)
        q, *new = on_mesh(into, rows, fused, positions, cache.k, cache.v)
        cache = LayerCache(*new)
        at_slots = functools.partial(_at_slots, causal=causal)
        look, held = at_slots if few else functools.partial(_in_order, whole=True), (cache,)
    else:
        q, k, v = on_mesh(functools.partial(split, heads=heads), rows, fused, positions)
        look, held = _in_order, (LayerCache(k, v), cache)
        if cache is not None:
            put = functools.partial(store, ring=ring)
            pairs = ((cache.k, k), (cache.v, v))
            cache = LayerCache(*(on_mesh(put, rows, *pair, positions) for pair in pairs))
    q = reshard(q, *rows, group)
    by_head = (*rows[2:], group)
    weights = P(rows[0], *by_head) if with_weights else None
    look = functools.partial(look, window=window, kernels=kernels, with_weights=with_weights)
    out, weights = on_mesh(look, (P(*rows, group), weights), q, positions, sink, *held)
    return out, cache, weights


def store_context(
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K V"],
    positions: Int[Array, "B T"],
    cache: LayerCache,
    heads: Heads,
) -> LayerCache:
    """A ring with keys, which are rotated first, and values, which are scaled, in their slots.

    Args:
      k: keys of T positions, in natural order.
      v: values of these.
      positions: as in `cached_attention`; those that are negative are not stored.
      cache: the ring.
      heads: how to rotate and scale.
    """

    def put(k: Array, v: Array, positions: Array, cache: LayerCache) -> LayerCache:
        k = apply_rotary(k, *rotary_angles(positions, heads.rotary, heads.theta))
        v = scaled(v, heads)
        pairs = ((cache.k, k), (cache.v, v))
        return LayerCache(*(store(*pair, positions, ring=True) for pair in pairs))

    rows = P(*entries(k)[:3])
    return on_mesh(put, rows, k, v, positions, cache)


def _at_slots(
    q: Array,
    positions: Array,
    sink: Any,
    cache: LayerCache,
    *,
    window: int | None,
    kernels: Sequence[str],
    causal: bool,
    with_weights: bool,
) -> tuple[Array, Array | None]:
    """Attention of tokens that are in the cache already."""
    k, v = cache.k, cache.v
    if with_weights:
        seen = visible_slots(positions, (q.shape[1], k.shape[1]), window=window, causal=causal)
        return attend(q, k, v, seen, sink)
    options = {"window": window, "causal": causal, "sink": sink, "kernels": kernels}
    return decode_attention(q, k, v, positions, **options), None


def _in_order(
    q: Array,
    positions: Array,
    sink: Any,
    held: LayerCache,
    ring: LayerCache | None = None,
    *,
    whole: bool = False,
    window: int | None,
    kernels: Sequence[str],
    with_weights: bool,
) -> tuple[Array, Array | None]:
    """Attention over successive keys: of the whole sequence, or of the tokens, after those that a
    ring had before."""
    k, v = held.k, held.v
    there = positions >= 0
    padding = jnp.argmax(there, axis=1).astype(positions.dtype)  # before a row's first token
    newest = positions.max(axis=1)
    first = newest - there.sum(axis=1, dtype=positions.dtype) + 1
    # Positions of the first of T tokens, which may be padding, of the first key and the last token.
    if whole:
        spans = (first - padding, jnp.zeros_like(first), newest)
    elif ring is None or window is None:
        # Counted from the first real token, before which there is nothing to see.
        spans = (-padding, -padding, newest - first)
    else:
        k, v = (
            _after_window(old, own, first, padding, window)
            for old, own in ((ring.k, k), (ring.v, v))
        )
        spans = (first - padding, first - padding - window, newest)
    if with_weights:
        seen = visible(*spans, (q.shape[1], k.shape[1]), window=window)
        return attend(q, k, v, seen, sink)
    return attention(q, k, v, *spans, sink, window=window, kernels=kernels), None


def _after_window(
    ring: Float[Array, "B R K _"],
    own: Float[Array, "B T K _"],
    first: Int[Array, " B"],
    padding: Int[Array, " B"],
    window: int,
) -> Float[Array, "B _ K _"]:
    """The tokens' own keys or values after those of the positions before them.

    One more than a window has, so that sizes stay round; they take the place of padding.
    """

    @jax.vmap
    def joined(ring: Array, own: Array, first: Array, padding: Array) -> Array:
        earlier = ring[(first - window + jnp.arange(window)) % ring.shape[0]]
        own = jnp.pad(own.astype(ring.dtype), ((window, 0), (0, 0), (0, 0)))
        return jax.lax.dynamic_update_slice_in_dim(own, earlier, padding, 0)

    return joined(ring, own, first, padding)
