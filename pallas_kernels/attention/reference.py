"""Attention of many new tokens in plain jnp: the definition of the operation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.einsum import einsum32


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
      k, v: keys and values.
      first_query, first_key: the positions of each sequence's first token and first key, negative
        ones for padding before a sequence begins.
      newest: the position of the last token; later ones are padding.  Padding gets zeros.
      sink: a logit a query head that takes part in the normaliser.
      window: a token sees that many positions, its own included; None for all.

    Returns:
      In q's dtype; computed in float32.
    """
    sizes = (q.shape[1], k.shape[1])
    seen = visible(first_query, first_key, newest, sizes, window=window)
    return attend(q, k, v, seen, sink)


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    seen: Bool[Array, "B T S"],
    sink: Float[Array, "K G"] | None,
) -> Float[Array, "B T K G V"]:
    """Softmax attention over the keys that each token sees; zeros if there are none.

    In q's dtype; computed in float32.
    """
    scores = einsum32("btkgh,bskh->bkgts", q, k) * q.shape[-1] ** -0.5
    weights = softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), sink)
    return einsum32("bkgts,bskv->btkgv", weights, v.astype(jnp.float32)).astype(q.dtype)


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
