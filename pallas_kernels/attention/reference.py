"""Attention of many new tokens in plain jnp: the definition of the operation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.einsum import einsum32

# Scores of so many tokens are held at a time, so that long prompts never need T x S memory.
QUERY_BLOCK = 256


def visible(
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sizes: tuple[int, int],
    *,
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Which of S keys each of T tokens sees; see `attention`."""
    t, s = sizes
    own = (first_query[:, None] + jnp.arange(t))[:, :, None]
    key = (first_key[:, None] + jnp.arange(s))[:, None, :]
    seen = (own >= 0) & (own <= newest[:, None, None]) & (key >= 0) & (key <= own)
    return seen if window is None else seen & (key > own - window)


def attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    first_query: Int[Array, " B"],
    first_key: Int[Array, " B"],
    newest: Int[Array, " B"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
) -> Float[Array, "B T K G V"]:
    """Causal softmax attention of successive tokens over successive keys.

    Args:
      q: queries, G for each of K key/value heads.
      k: keys.
      v: values.
      first_query: the position of each sequence's first token, negative for padding before a
        sequence begins.
      first_key: the position of its first key, likewise.
      newest: the position of the last token; later ones are padding.  Padding gets zeros.
      sink: a logit a query head that takes part in the normaliser.
      window: a token sees that many positions, its own included; None for all.

    Returns:
      In q's dtype; sums are in float32.
    """
    t, s = q.shape[1], k.shape[1]
    if t <= QUERY_BLOCK:
        seen = visible(first_query, first_key, newest, (t, s), window=window)
        return attend(q, k, v, seen, sink)[0]
    blocks = -(-t // QUERY_BLOCK)
    q = jnp.pad(q, ((0, 0), (0, blocks * QUERY_BLOCK - t), *[(0, 0)] * 3))
    # A block of tokens with a window looks only at the keys that it can reach.
    reach = s if window is None else min(s, QUERY_BLOCK + window - 1)

    def block(i: Int[Array, ""]) -> Array:
        start = i * QUERY_BLOCK
        tokens = jax.lax.dynamic_slice_in_dim(q, start, QUERY_BLOCK, 1)
        first = first_query + start
        keys, values, begin = k, v, first_key
        if reach < s:
            at = jnp.clip(first - (window or 0) + 1 - first_key, 0, s - reach)
            keys, values, begin = _rows(k, at, reach), _rows(v, at, reach), first_key + at
        seen = visible(first, begin, newest, (QUERY_BLOCK, reach), window=window)
        return attend(tokens, keys, values, seen, sink)[0]

    out = jax.lax.map(block, jnp.arange(blocks))
    return jnp.moveaxis(out, 0, 1).reshape(q.shape[0], -1, *out.shape[3:])[:, :t]


def _rows(x: Float[Array, "B S K H"], first: Int[Array, " B"], count: int) -> Array:
    return jax.vmap(lambda a, i: jax.lax.dynamic_slice_in_dim(a, i, count))(x, first)


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    seen: Bool[Array, "B T S"],
    sink: Float[Array, "K G"] | None,
) -> tuple[Float[Array, "B T K G V"], Float[Array, "B K G T S"]]:
    """Softmax attention over the keys that each token sees; zeros if there are none.

    Returns:
      In q's dtype, and the weights in float32, which sum to less than 1 with a sink.
    """
    scores = einsum32("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    weights = softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), sink)
    return einsum32("bkgts,bskv->btkgv", weights.astype(v.dtype), v).astype(q.dtype), weights


def softmax(
    scores: Float[Array, "B K G T S"], sink: Float[Array, "K G"] | None
) -> Float[Array, "B K G T S"]:
    """Softmax whose normaliser has one logit a query head more; zeros where all scores are -inf.

    With a sink weights sum to less than 1.
    """
    top = jnp.maximum(scores.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    extra = 0.0
    if sink is not None:
        logit = sink.astype(jnp.float32)[None, :, :, None, None]
        top = jnp.maximum(top, logit)
        extra = jnp.exp(logit - top)
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True) + extra
    return weights / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
