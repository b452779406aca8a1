"""Attention of a few new tokens over a cache in plain jnp: the definition of the operation."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.attention.reference import attend

MAX_QUERIES = 16  # tokens a sequence that the operation is made for


def refused(tokens: int, slots: int, window: int | None) -> str | None:
    """Why so many tokens can't look at a cache that has them already; None if they can."""
    if tokens > MAX_QUERIES:
        return f"{tokens} tokens a sequence are more than {MAX_QUERIES}"
    if window is not None and window + tokens - 1 > slots:
        lost = f"{tokens} tokens with a window of {window} see"
        return f"a ring of {slots} slots has lost what {lost}"
    return None


def slot_positions(newest: Int[Array, " B"], slots: int, *, ring: bool) -> Int[Array, "B S"]:
    """The position each slot holds when `newest` is the last one written (-1: none yet).

    Position p is in slot p; of a ring in slot p modulo the number of slots, and one that was never
    written gets a negative position.
    """
    slot = jnp.arange(slots, dtype=jnp.int32)[None, :]
    if not ring:
        return jnp.broadcast_to(slot, (newest.shape[0], slots))
    return newest[:, None] - (newest[:, None] - slot) % slots


def visible_slots(
    positions: Int[Array, "B T"], sizes: tuple[int, int], *, window: int | None, causal: bool = True
) -> Bool[Array, "B T S"]:
    """Which of S slots each of T tokens sees; see `decode_attention`."""
    newest = positions.max(axis=1)
    held = slot_positions(newest, sizes[1], ring=window is not None)[:, None]
    own = positions[:, :, None]
    seen = (held >= 0) & (held <= (own if causal else newest[:, None, None])) & (own >= 0)
    return seen if window is None else seen & (held > own - window)


def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int[Array, "B T"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
) -> Float[Array, "B T K G V"]:
    """Softmax attention over a cache that has the tokens' own keys and values already.

    Args:
      q: queries, G for each of K key/value heads.
      k: keys in the cache's slots.
      v: values in the cache's slots.
      positions: of the tokens; negative for padding, which gets zeros.
      sink: a logit a query head that takes part in the normaliser.
      window: a token sees that many positions, its own included, and the cache is a ring; None for
        all, in a cache that has a slot for each.
      causal: a token sees no later one; otherwise all tokens of the call see each other.

    Returns:
      In q's dtype; sums are in float32.
    """
    sizes = (q.shape[1], k.shape[1])
    seen = visible_slots(positions, sizes, window=window, causal=causal)
    return attend(q, k, v, seen, sink)[0]
