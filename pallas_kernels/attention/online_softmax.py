"""Softmax over blocks of keys, in Triton kernels: the sums so far, and what a block adds to them.

Scores are in powers of two.  A head's dimension that is no power of two is cut into several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Bool, Float

LOWEST = -1e30  # a score that counts for nothing, however small the others
EMPTY = -1e20  # the largest score so far, before there is one

# Weighted values [R, V], the largest score and the sum of weights [R].
Sums = tuple[Array, Array, Array]


def refused(q: Any, k: Any, v: Any) -> str | None:
    """Why dtypes or heads can't be done; None if they can."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all bfloat16"
    head, width = q.shape[-1], v.shape[-1]
    if head % 16 or width & (width - 1) or width < 16:
        return f"heads of {head} and {width}: keys must be multiples of 16, values powers of 2"
    return None


def parts(size: int) -> list[tuple[int, int]]:
    """A dimension as powers of two: offsets and sizes."""
    found, start = [], 0
    while start < size:
        part = 1 << ((size - start).bit_length() - 1)
        found.append((start, part))
        start += part
    return found


def begin(rows: int, width: int) -> Sums:
    """Sums of nothing."""
    return (
        jnp.zeros((rows, width), jnp.float32),
        jnp.full(rows, EMPTY, jnp.float32),
        jnp.zeros(rows, jnp.float32),
    )


def add(
    sums: Sums,
    q: Sequence[Float[Array, "R _"]],
    k: Sequence[Float[Array, "N _"]],
    v: Float[Array, "N V"],
    head: int,
    seen: Bool[Array, "R N"] | None = None,
) -> Sums:
    """With a block of keys, of which rows see some or all (None).

    Args:
      sums: those so far.
      q, k: queries and keys, in the parts of their dimension.
      v: values.
      head: the dimension, which scores are divided by the root of.
      seen: which keys count.
    """
    total, top, norm = sums
    scores = sum((plt.dot(a, b.T) for a, b in zip(q, k)), jnp.float32(0))
    scores = scores * (head**-0.5 * math.log2(math.e))
    if seen is not None:
        scores = jnp.where(seen, scores, LOWEST)
    higher = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.exp2(scores - higher[:, None])
    shrink = jnp.exp2(top - higher)
    total = total * shrink[:, None] + plt.dot(weights.astype(v.dtype), v)
    return total, higher, norm * shrink + jnp.sum(weights, axis=1)


def finish(sums: Sums, sink: Any) -> Float[Array, "R V"]:
    """The weighted mean; a sink's logit [R] is in the normaliser.  Zeros where nothing was seen."""
    total, top, norm = sums
    sink = sink.astype(jnp.float32) * math.log2(math.e)
    higher = jnp.maximum(top, sink)
    shrink = jnp.exp2(top - higher)
    norm = norm * shrink + jnp.exp2(sink - higher)
    seen = top > EMPTY
    return jnp.where(seen[:, None], total * (shrink / jnp.where(seen, norm, 1.0))[:, None], 0.0)
