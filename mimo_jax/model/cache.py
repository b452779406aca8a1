"""The key/value cache: plain arrays whose contents are located by position alone.

Position p of a sequence lives in slot p of a full-attention layer and in slot p mod R of a sliding
layer's ring of R slots.  Which position a slot holds follows from the newest position written, so
there is no stored length and nothing to undo when draft tokens are rejected: the next step simply
writes over them.  That is safe as long as a step writes at most `slack` tokens more than are kept,
since an overwritten ring slot then belonged to a position outside every later window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.config import MiMoConfig
from mimo_jax.model.placement import Placement

RING_SLACK = 128
CACHE_AXES = ("batch", "slot", "kv_heads", None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys [B, S, K, H] and (already scaled) values [B, S, K, V]."""

    k: Any
    v: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """The cache of a whole stack.

    Attributes:
      layers: one `LayerCache` a decoder layer.
      max_len: positions that full-attention layers hold.
      slack: ring slots beyond the window in sliding layers.
    """

    layers: tuple[LayerCache, ...]
    max_len: int = dataclasses.field(metadata={"static": True})
    slack: int = dataclasses.field(metadata={"static": True})


def init_cache(
    config: MiMoConfig,
    batch: int,
    max_len: int,
    dtype: Any = None,
    slack: int = RING_SLACK,
    placement: Placement | None = None,
) -> KVCache:
    """An empty cache for `batch` sequences of up to `max_len` positions.

    Args:
      config: the model's configuration.
      batch: sequences B.
      max_len: capacity of full-attention layers; sliding layers hold window + slack slots.
      dtype: of keys and values; the config's by default.
      slack: how many tokens a cached step may add (and reject) without an old key being lost.
      placement: the mesh and rules to split it by.

    Raises:
      ShardingError: the mesh does not divide the batch.
      ValueError: max_len exceeds the model's max_position_embeddings or is not positive, or slack
        is negative.
    """
    if not 0 < max_len <= config.max_position_embeddings:
        raise ValueError(
            f"cache length {max_len} is outside 1..{config.max_position_embeddings}, the model's "
            "max_position_embeddings; shorten the prompt or max_tokens"
        )
    if slack < 0:
        raise ValueError(f"slack={slack} ring slots beyond the window: it must not be negative")
    slots = [max_len if s.window is None else s.window + slack for s in config.layers]
    sizes = [
        (n, s.num_kv_heads, s.head_dim, s.v_head_dim)
        for n, s in zip(slots, config.layers, strict=True)
    ]
    layers = empty_layers(sizes, batch, dtype or config.dtype, placement)
    return KVCache(layers, max_len, slack)


def empty_layers(
    sizes: Sequence[tuple[int, int, int, int]],
    batch: int,
    dtype: Any,
    placement: Placement | None = None,
) -> tuple[LayerCache, ...]:
    """Caches of layers, with nothing in them.

    Args:
      sizes: slots S, KV heads K, and widths H and V of each layer.
      batch: sequences B.
      dtype: of keys and values.
      placement: as for `init_cache`.
    """

    return _maker(tuple(sizes), batch, jnp.dtype(dtype), placement)()


@functools.cache
def _maker(
    sizes: tuple[tuple[int, int, int, int], ...],
    batch: int,
    dtype: jnp.dtype,
    placement: Placement | None,
) -> Callable[[], tuple[LayerCache, ...]]:
    """What makes all arrays in one call; a call each would take the host ten milliseconds."""

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        placed = None if placement is None else placement.sharding("cache", CACHE_AXES, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed)

    layers = tuple(LayerCache(array(batch, s, k, h), array(batch, s, k, v)) for s, k, h, v in sizes)
    return jax.jit(
        lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), layers),
        out_shardings=jax.tree.map(lambda a: a.sharding, layers),
    )
