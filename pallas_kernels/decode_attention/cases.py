"""Named cases of attention over a cache, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.attention.cases import heads


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and how full the cache is.

    Attributes:
      lengths: positions in the cache after the call, of each sequence.
      queries: new tokens a sequence, the last of those positions.
      kv_heads, group, head, value: K, G, H and V.
      slots: S; those of a ring if there is a window.
      window, sink, causal: of the operation; the sink is the logit of all heads.
      logits: the largest score, about.
    """

    lengths: tuple[int, ...]
    queries: int
    kv_heads: int
    group: int
    head: int
    value: int
    slots: int
    window: int | None = None
    sink: float | None = None
    causal: bool = True
    logits: float = 10.0


def _pro(lengths: tuple[int, ...], queries: int, slots: int, window: int | None = None) -> Case:
    return Case(lengths, queries, 8, 16, 192, 128, slots, window, sink=0.5 if window else None)


def _ragged(batch: int, longest: int) -> tuple[int, ...]:
    rng = np.random.default_rng(0)
    return tuple(int(n) for n in rng.integers(longest // 32, longest, batch))


# Pro's heads; Flash's full layers have 4 KV heads, and its sliding ones 8 groups of 8.
REAL = {
    f"{name} x{queries}": case
    for queries in (1, 8)
    for name, case in {
        "4k": _pro((4096,), queries, 4096),
        "32k": _pro((32768,), queries, 32768),
        "128k": _pro((131072,), queries, 131072),
        "16 of 4k": _pro((4096,) * 16, queries, 4096),
        "64 of 4k": _pro((4096,) * 64, queries, 4096),
        "16 ragged": _pro(_ragged(16, 8192), queries, 8192),
        "ring": _pro((4096,), queries, 256, 128),
        "16 rings": _pro((4096,) * 16, queries, 256, 128),
        "flash 32k": Case((32768,), queries, 4, 16, 192, 128, 32768),
        "flash ring": Case((4096,), queries, 8, 8, 192, 128, 256, 128, 0.5),
        "drafter ring": Case((4096,), queries, 8, 8, 128, 128, 1280, 1024, 0.5, causal=False),
    }.items()
}

# Small enough to be interpreted.
SMALL = {
    "one key": Case((1,), 1, 2, 16, 192, 128, 64),
    "one key each of two tokens": Case((2,), 2, 1, 4, 64, 64, 40),
    "at a block's edge": Case((64, 128, 129), 1, 1, 16, 64, 32, 136),
    "a verified block": Case((77,), 8, 2, 16, 192, 128, 200),
    "lengths far apart": Case((1, 300), 1, 1, 16, 64, 64, 304),
    "padded tokens": Case((3, 90), 5, 2, 8, 64, 64, 96),
    "a great sink": Case((70,), 2, 1, 8, 64, 64, 80, sink=30.0),
    "a small sink": Case((70,), 2, 1, 8, 64, 64, 80, sink=-30.0),
    "great logits": Case((150,), 1, 1, 16, 64, 64, 160, logits=1e4),
    "a ring not yet full": Case((30,), 3, 2, 8, 192, 128, 160, 128, 0.5),
    "a window over a ring's end": Case((300, 257), 4, 1, 16, 64, 32, 144, 128, 0.5),
    "a small window": Case((50,), 2, 2, 4, 64, 64, 24, 7, -1.0),
    "a drafted block": Case((700,), 8, 1, 8, 128, 128, 592, 512, 0.5, causal=False),
}


def arrays(case: Case, seed: int) -> tuple[tuple[Array, Array, Array, Array], dict[str, Any]]:
    """Queries, keys, values (bfloat16) and positions; and the options of the operation.

    Slots that no sequence has written hold finite numbers, as a cache's do.
    """
    qkv, sink = heads(case, len(case.lengths), case.queries, case.slots, seed)
    newest = np.asarray(case.lengths)[:, None] - 1
    positions = jnp.asarray(newest - np.arange(case.queries)[::-1], jnp.int32)
    return (*qkv, positions), {"window": case.window, "causal": case.causal, **sink}
