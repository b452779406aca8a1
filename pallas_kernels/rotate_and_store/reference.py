"""What becomes of a fused QKV projection, in plain jnp: the definition of the operation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Heads:
    """A layer's heads, as they lie in the rows of its fused projection.

    Attributes:
      kv_heads: of a chunk of rows, which has their query heads, their keys and their values.
      group: query heads a KV head.
      head: width of queries and keys.
      value: width of values.
      rotary: leading dimensions of a head that are rotated.
      theta: base of the rotary frequencies.
      value_scale: what values are multiplied by, if anything.
    """

    kv_heads: int
    group: int
    head: int
    value: int
    rotary: int
    theta: float
    value_scale: float | None

    @property
    def rows(self) -> tuple[int, int, int]:
        """Rows of a chunk that are queries, keys and values."""
        keys = self.kv_heads * self.head
        return self.group * keys, keys, self.kv_heads * self.value


def rotate_and_store(
    fused: Float[Array, "B T C R"],
    positions: Int[Array, "B T"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K V"],
    *,
    heads: Heads,
    ring: bool,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Rotated queries of new tokens, and a cache with their keys and values in it.

    Args:
      fused: the projection's result, in C chunks of rows.
      positions: increasing by one along a row, below S unless the cache is a ring; negative for
        padding, which is not stored.
      k_cache: the slots of keys: position p is in slot p, of a ring in slot p modulo S.
      v_cache: the slots of values.
      heads: what a chunk consists of.
      ring: whether the cache is one.
    """
    q, k, v = split(fused, positions, heads)
    return q, store(k_cache, k, positions, ring=ring), store(v_cache, v, positions, ring=ring)


def split(
    fused: Float[Array, "B T C R"], positions: Int[Array, "B T"], heads: Heads
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B T K H"], Float[Array, "B T K V"]]:
    """Rotated queries and keys, and scaled values, of a fused projection."""
    n_q, n_k, _ = heads.rows
    q, k, v = jnp.split(fused, [n_q, n_q + n_k], axis=-1)
    lead = (*fused.shape[:2], fused.shape[2] * heads.kv_heads)
    q, k = q.reshape(*lead, heads.group, heads.head), k.reshape(*lead, heads.head)
    v = scaled(v.reshape(*lead, heads.value), heads)
    cos, sin = rotary_angles(positions, heads.rotary, heads.theta)
    return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v


def scaled(v: Float[Array, "*b V"], heads: Heads) -> Float[Array, "*b V"]:
    """Values as the cache has them."""
    return v if heads.value_scale is None else v * jnp.asarray(heads.value_scale, v.dtype)


def rotary_angles(
    positions: Int[Array, "B T"], rotary_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of position / theta^(2i / rotary_dim), float32.

    The exponent's denominator is the rotary width, not the head width.  Frequencies are computed
    on the host, so that no backend's pow can shift the angles of large positions.
    """
    inv_freq = jnp.asarray(theta ** -(np.arange(0, rotary_dim, 2) / rotary_dim), jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(
    x: Float[Array, "B T *heads H"],
    cos: Float[Array, "B T half"],
    sin: Float[Array, "B T half"],
) -> Float[Array, "B T *heads H"]:
    """Rotates the leading 2 * half dimensions of each head, pairing i with i + half (NeoX)."""
    half = cos.shape[-1]
    over_heads = tuple(range(2, x.ndim - 1))
    cos, sin = (jnp.expand_dims(a, over_heads).astype(x.dtype) for a in (cos, sin))
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def store(
    cache: Float[Array, "B S K _"],
    new: Float[Array, "B T K _"],
    positions: Int[Array, "B T"],
    *,
    ring: bool,
) -> Float[Array, "B S K _"]:
    """A cache with new tokens' keys or values in their slots.

    Tokens at negative positions are not stored, nor are those that later tokens of the same call
    would overwrite in a ring.
    """
    slots = cache.shape[1]
    slot = jnp.where(positions >= 0, positions, slots)
    if ring:
        newest = positions.max(axis=1, keepdims=True)
        kept = (positions >= 0) & (positions > newest - slots)
        slot = jnp.where(kept, positions % slots, slots)

    @jax.vmap
    def scattered(cache: Array, slot: Array, new: Array) -> Array:
        return cache.at[slot].set(new.astype(cache.dtype), mode="drop")

    return scattered(cache, slot, new)
