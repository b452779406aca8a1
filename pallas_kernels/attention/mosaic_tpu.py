"""Attention of many new tokens on TPUs; the kernel is in `mosaic_tpu_parts`.

Blocks of keys that none of a program's tokens sees are neither read nor computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic_tpu
from pallas_kernels.attention import mosaic_tpu_parts as parts
from pallas_kernels.attention.mosaic_tpu_parts import Blocks
from pallas_kernels.filling import up
from pallas_kernels.mosaic_tpu import LANES, SUBLANES

# Tokens of a program times query heads of a KV head: what the matrix unit multiplies at once.
ROWS = 1024
# By the compiler's schedule for a v5e, these rows take 716 cycles for 128 keys in blocks of 512,
# 1005 in blocks of 256 and 782 in blocks of 1024.
KEYS = 512


def choose_blocks(q: Any, k: Any, v: Any, window: int | None) -> Blocks:
    """Blocks that fit in VMEM."""
    _, t, heads, group, head = q.shape
    keys = KEYS if window is None else min(KEYS, max(LANES, window // LANES * LANES))
    width = up(v.shape[-1], LANES)
    # Queries and results twice, as one is copied while another is used; and float32 sums.
    copied = 2 * 2 * up(group, SUBLANES) * (up(head, LANES) + width)
    each = heads * (copied + 4 * group * (2 * LANES + width))
    fitting = min(ROWS // group, mosaic_tpu.vmem_bytes() // 2 // each)
    tokens = max(fitting // SUBLANES * SUBLANES, SUBLANES)
    return Blocks(min(tokens, t), parts.key_block(k, v, keys))


def unsupported(q: Any, k: Any, v: Any, window: int | None = None) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    del window
    return parts.refused(q, k, v)


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
    blocks: Blocks | None = None,
    interpret: Any = False,
) -> Float[Array, "B T K G V"]:
    """`reference.attention`.

    Args:
      q, k, v: see there; bfloat16.
      first_query, first_key, newest, sink, window: see there.
      blocks: None for those of `choose_blocks`.
      interpret: False, True, or `pltpu.InterpretParams`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(q, k, v, window):
        raise NotImplementedError(reason)
    t, n_keys = q.shape[1], k.shape[1]
    blocks = blocks or choose_blocks(q, k, v, window)
    scalars = [a.astype(jnp.int32) for a in (first_query, first_key, newest)]
    visible = _Span(n_keys, window, blocks)
    return parts.attend(
        *(q, k, v, sink, visible, scalars),
        key_blocks=visible.most_blocks(scalars, t),
        blocks=blocks,
        interpret=interpret,
        name="attention",
    )


@dataclasses.dataclass(frozen=True)
class _Span(parts.Visible):
    """What successive tokens see of successive keys.

    The scalars are the positions of each sequence's first token, first key and last token.

    Attributes:
      n_keys: S.
      window: positions that a token sees; None for all.
      size: of blocks.
    """

    n_keys: int
    window: int | None
    size: Blocks

    def most_blocks(self, scalars: Sequence[Int[Array, " B"]], tokens: int) -> Any:
        """A number of blocks of keys that suffices for all blocks of so many tokens."""
        count = pl.cdiv(self.n_keys, self.size.keys)
        if self.window is not None:
            # A block's tokens see so many successive keys, which may begin anywhere in a block.
            seen = self.size.tokens + self.window - 1
            return min(count, pl.cdiv(seen - 1, self.size.keys) + 1)
        first_query, first_key, newest = scalars
        last = jnp.minimum(newest, first_query + tokens - 1) - first_key
        return jnp.clip(jnp.max(last) // self.size.keys + 1, 1, count)

    def _positions(self, scalars: Sequence[Any], b: Any, i: Any) -> tuple[Any, Any]:
        first = scalars[0][b] + i * self.size.tokens
        return first, first + self.size.tokens - 1

    def blocks(self, scalars: Sequence[Any], b: Any, i: Any) -> tuple[Any, Any]:
        first_key, newest = scalars[1][b], scalars[2][b]
        own, last = self._positions(scalars, b, i)
        oldest = 0 if self.window is None else jnp.maximum(own - self.window + 1, 0)
        begin = jnp.maximum(oldest - first_key, 0)
        end = jnp.minimum(jnp.minimum(newest, last) + 1 - first_key, self.n_keys)
        seen = (own <= newest) & (begin < end)
        begin, n = jnp.minimum(begin, self.n_keys - 1), self.size.keys
        return begin // n, jnp.where(seen, (end + n - 1) // n, 0)

    def whole(self, scalars: Sequence[Any], b: Any, i: Any, block: Any) -> Any:
        if self.window is not None and self.window < sum(dataclasses.astuple(self.size)) - 1:
            return None
        own, last = self._positions(scalars, b, i)
        begin, end = block * self.size.keys, (block + 1) * self.size.keys
        first_key, newest = scalars[1][b], scalars[2][b]
        low, high = first_key + begin, first_key + end - 1
        seen = (low >= 0) & (high <= own) & (last <= newest) & (end <= self.n_keys)
        return seen if self.window is None else seen & (low > last - self.window)

    def bounds(self, scalars: Sequence[Any], b: Any, i: Any, token: Array) -> tuple[Array, Array]:
        own = self._positions(scalars, b, i)[0] + token
        low = jnp.zeros_like(own) if self.window is None else jnp.maximum(own - self.window + 1, 0)
        return low, jnp.where(own <= scalars[2][b], own, -1)

    def held(self, scalars: Sequence[Any], b: Any, key: Array) -> Array:
        return scalars[1][b] + key
