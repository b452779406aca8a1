"""Named cases of the way from a fused projection to queries and a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.rotate_and_store.reference import Heads


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and where the tokens are.

    Attributes:
      heads: of a chunk.
      chunks, tokens, slots: C, T and S.
      newest: the last token's position, of each sequence; T - 1 at least, or -1 for padding only.
      ring: whether the cache is one.
    """

    heads: Heads
    chunks: int
    tokens: int
    slots: int
    newest: tuple[int, ...]
    ring: bool = False


PRO = Heads(1, 16, 192, 128, 64, 5e6, 0.612)
PRO_SLIDING = dataclasses.replace(PRO, theta=1e4)
REAL = {
    f"{name}{tokens} x {batch}": Case(heads, 8, tokens, slots, (1000,) * batch, ring)
    for tokens, batch in ((1, 1), (8, 1), (1, 16), (8, 16))
    for name, heads, slots, ring in (("", PRO, 4096, False), ("ring ", PRO_SLIDING, 256, True))
}

# Small enough to be interpreted.
SMALL = {
    "one token": Case(Heads(1, 4, 48, 32, 16, 1e4, 0.707), 2, 1, 40, (0,)),
    "several tokens": Case(Heads(2, 3, 24, 16, 8, 1e4, None), 2, 5, 40, (17, 39)),
    "release heads": Case(PRO, 1, 2, 20, (9,)),
    "an odd rotary width": Case(Heads(1, 2, 24, 16, 12, 5e6, 0.707), 1, 3, 8, (6, 2)),
    "over a ring's end": Case(Heads(2, 2, 48, 32, 16, 1e4, 0.707), 1, 6, 16, (33, 5, 16), True),
    "padding": Case(Heads(1, 2, 48, 32, 16, 1e4, 0.707), 2, 3, 12, (-1, 7), True),
    # Of which TPUs have several blocks of slots; wide heads are stored otherwise, and so is one.
    "blocks of slots": Case(Heads(2, 2, 48, 32, 16, 1e4, 0.707), 2, 5, 200, (17, 130, 199)),
    "wide heads": Case(Heads(1, 2, 128, 128, 64, 1e4, None), 3, 16, 256, (8, 136, -1)),
    "one wide head": Case(Heads(1, 4, 128, 128, 64, 1e4, None), 1, 16, 256, (8, 136, 255)),
    "over a long ring's end": Case(
        Heads(1, 2, 192, 128, 64, 1e4, 0.612), 2, 16, 256, (255, 260, 7), True
    ),
    "over a ring's end, wide": Case(
        Heads(1, 2, 128, 128, 64, 1e4, 0.612), 1, 16, 256, (255, 260, 7), True
    ),
    "many tokens": Case(Heads(1, 2, 48, 128, 16, 1e4, None), 2, 300, 640, (299, 430, 77)),
}


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the arguments of the operation: the projection, positions, keys and values."""
    batch, h = len(case.newest), case.heads
    kv = case.chunks * h.kv_heads
    return (
        jax.ShapeDtypeStruct((batch, case.tokens, case.chunks, sum(h.rows)), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, case.tokens), jnp.int32),
        jax.ShapeDtypeStruct((batch, case.slots, kv, h.head), jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, case.slots, kv, h.value), jnp.bfloat16),
    )


def arrays(case: Case, seed: int) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Arguments of the operation (bfloat16, and int32 positions), and its options."""
    rng = np.random.default_rng(seed)
    given, at, *caches = shapes(case)
    fused, k, v = (
        jnp.asarray(rng.standard_normal(a.shape, np.float32), a.dtype) for a in (given, *caches)
    )
    newest = np.asarray(case.newest)[:, None]
    positions = np.where(newest < 0, -1, newest - np.arange(case.tokens)[::-1])
    return (fused, jnp.asarray(positions, at.dtype), k, v), {"heads": case.heads, "ring": case.ring}
