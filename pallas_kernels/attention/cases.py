"""Named cases of attention of many tokens, for tests and benchmarks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and which tokens there are.

    Attributes:
      tokens, keys: T and S.
      kv_heads, group, head, value: K, G, H and V.
      spans: of each sequence the positions of its first token, its first key and its last token.
      window, sink: of the operation; the sink is the logit of all heads.
      logits: the largest score, about.
    """

    tokens: int
    keys: int
    kv_heads: int
    group: int
    head: int
    value: int
    spans: tuple[tuple[int, int, int], ...]
    window: int | None = None
    sink: float | None = None
    logits: float = 10.0


def _whole(tokens: int, *heads: int, **options: Any) -> Case:
    return Case(tokens, tokens, *heads, spans=((0, 0, tokens - 1),), **options)


PRO = (8, 16, 192, 128)
FLASH = (4, 16, 192, 128)
FLASH_SLIDING = (8, 8, 192, 128)
REAL = {
    **{f"pro {n}": _whole(n, *PRO, sink=0.5) for n in (2048, 8192, 32768)},
    **{f"pro window {n}": _whole(n, *PRO, window=128, sink=0.5) for n in (2048, 32768)},
    "pro 2048 after 30000": Case(2048, 32048, *PRO, spans=((30000, 0, 32047),)),
    "flash 8192": _whole(8192, *FLASH),
    "flash window 8192": _whole(8192, *FLASH_SLIDING, window=128, sink=0.5),
}

# Small enough to be interpreted.
SMALL = {
    "one token": _whole(1, 1, 2, 64, 32),
    "release heads": _whole(130, 1, 2, 192, 128, sink=0.5),
    "after cached keys": Case(40, 200, 2, 2, 64, 64, ((100, 0, 139),), sink=-1.0),
    "padding before and after": Case(
        150, 150, 1, 2, 64, 64, ((-30, -30, 119), (0, 0, 99), (0, 0, 149)), sink=0.5
    ),
    "a window": _whole(300, 1, 4, 64, 64, window=128, sink=0.5),
    "a window after earlier keys": Case(140, 267, 1, 2, 192, 128, ((500, 373, 639),), 128, 0.5),
    "a window that has just begun": Case(70, 197, 2, 2, 64, 64, ((20, -107, 89),), 128, 0.5),
    "a small window": _whole(90, 1, 2, 64, 64, window=5),
    "a great sink": _whole(100, 1, 2, 64, 64, sink=30.0),
    "a small sink": _whole(100, 1, 2, 64, 64, sink=-30.0),
    "great logits": _whole(100, 1, 2, 64, 64, logits=1e4),
}


def arrays(case: Case, seed: int) -> tuple[tuple[Array, ...], dict[str, Any]]:
    """Arguments of the operation (bfloat16, and int32 positions), and its options."""
    qkv, sink = heads(case, len(case.spans), case.tokens, case.keys, seed)
    spans = jnp.asarray(case.spans, jnp.int32)
    return (*qkv, *spans.T), {"window": case.window, **sink}


def heads(
    case: Any, batch: int, tokens: int, keys: int, seed: int
) -> tuple[tuple[Array, Array, Array], dict[str, Array]]:
    """Random queries, keys and values of a case, here or of `decode_attention`, and its sink."""
    rng = np.random.default_rng(seed)
    shapes = (
        (batch, tokens, case.kv_heads, case.group, case.head),
        (batch, keys, case.kv_heads, case.head),
        (batch, keys, case.kv_heads, case.value),
    )
    q, k, v = (jnp.asarray(rng.standard_normal(s, np.float32), jnp.bfloat16) for s in shapes)
    # Scores are about normal, and 4 is the largest of a few thousand.
    q = q * jnp.asarray(case.logits / 4, jnp.bfloat16)
    if case.sink is None:
        return (q, k, v), {}
    return (q, k, v), {"sink": jnp.full((case.kv_heads, case.group), case.sink, jnp.float32)}
