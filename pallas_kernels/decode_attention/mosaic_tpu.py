"""Attention of a few new tokens over a cache, on TPUs; see `attention.mosaic_tpu_parts`.

A program has all tokens of a sequence.  Blocks of keys after the newest one are not read.  Of a
ring all slots are: it has few more than a window, and which ones have begun is all that matters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels.attention import mosaic_tpu_parts as parts
from pallas_kernels.attention.mosaic_tpu_parts import Blocks
from pallas_kernels.decode_attention.reference import refused

# Of Pro's that is 2.6 MB with the values, 3.2 microseconds of a v5e's memory bandwidth: little to
# wait for before the first block is there, and much beside what a step costs.
KEYS = 512


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    return parts.refused(q, k, v) or refused(q.shape[1], v.shape[1], window)


def decode_attention(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    positions: Int[Array, "B T"],
    sink: Float[Array, "K G"] | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
    keys: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B T K G V"]:
    """`reference.decode_attention`.

    Args:
      q, k, v: see there; bfloat16.
      positions, sink, window, causal: see there.
      keys: of a block: S, or a multiple of 128; None to choose.
      interpret: False, True, or `pltpu.InterpretParams`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    t, slots = q.shape[1], k.shape[1]
    positions = positions.astype(jnp.int32)
    newest, oldest = positions.max(axis=1), positions.min(axis=1)
    visible = _Slots(slots, window, causal, t, keys or parts.key_block(k, v, KEYS))
    return parts.attend(
        *(q, k, v, sink, visible, [positions.reshape(-1), newest, oldest]),
        key_blocks=jnp.maximum(visible.end(jnp.max(newest)), 1),
        blocks=Blocks(t, visible.size),
        interpret=interpret,
        name="decode_attention",
    )


@dataclasses.dataclass(frozen=True)
class _Slots(parts.Visible):
    """What a sequence's tokens see of a cache.

    The scalars are all positions [B * T], and the newest and the oldest of each sequence.

    Attributes:
      slots: S.
      window, causal: of the operation.
      tokens: T.
      size: of blocks of slots.
    """

    slots: int
    window: int | None
    causal: bool
    tokens: int
    size: int

    def end(self, newest: Any) -> Any:
        """The block after the last one that has been written to."""
        return pl.cdiv(jnp.minimum(newest + 1, self.slots), self.size)

    def blocks(self, scalars: Sequence[Any], b: Any, i: Any) -> tuple[Any, Any]:
        del i
        return 0, self.end(scalars[1][b])

    def whole(self, scalars: Sequence[Any], b: Any, i: Any, block: Any) -> Any:
        del i
        if self.window is not None:
            return None
        newest, oldest = scalars[1][b], scalars[2][b]
        last = oldest if self.causal else jnp.where(oldest < 0, oldest, newest)
        return (block + 1) * self.size <= jnp.minimum(last + 1, self.slots)

    def bounds(self, scalars: Sequence[Any], b: Any, i: Any, token: Array) -> tuple[Array, Array]:
        del i
        own = jnp.full_like(token, -1)
        for t in range(self.tokens):
            own = jnp.where(token == t, scalars[0][b * self.tokens + t], own)
        low = jnp.zeros_like(own) if self.window is None else jnp.maximum(own - self.window + 1, 0)
        return low, own if self.causal else jnp.where(own < 0, -1, scalars[1][b])

    def held(self, scalars: Sequence[Any], b: Any, key: Array) -> Array:
        if self.window is None:
            return key
        # Up to the newest one slots have positions of this time round, and then of the last.
        newest = scalars[1][b]
        at = lax.rem(newest, self.slots)
        return newest - at + jnp.where(key <= at, key, key - self.slots)
