"""What both attention kernels in Mosaic GPU share: what tokens see, and steps of a warpgroup."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import ROW, accumulator, bfloat16_transforms

ROWS = 64  # tokens of a warpgroup
PART = 64  # columns of queries and results that are copied together
ALIGNED = 8  # rows of a tile in shared memory, where copies begin and arrays end
LOG2E = math.log2(math.e)
EMPTY = -1e20  # the largest score so far, before there is one


@dataclasses.dataclass(frozen=True)
class Span:
    """What successive tokens see.

    Attributes:
      offset: the first token's index among keys.
      first_key, newest: positions of the first key and of the last token.
      n_keys: keys in memory.
      window: positions that a token sees; None for all.
    """

    offset: Any
    first_key: Any
    newest: Any
    n_keys: int
    window: int | None

    @property
    def first(self) -> Any:
        """Index of the first key that any of them sees."""
        first = lax.max(-self.first_key, 0)
        return first if self.window is None else lax.max(first, self.offset - (self.window - 1))

    @property
    def last(self) -> Any:
        """Index of the last key there is."""
        return lax.min(self.newest - self.first_key, self.n_keys - 1)

    def end(self, tokens: int) -> Any:
        """Index after the last key that any of so many tokens sees; not after `first` if none."""
        end = lax.min(self.last, self.offset + tokens - 1) + 1
        # Tokens after the last one are padding.
        is_token = self.offset + self.first_key <= self.newest
        return lax.select(is_token, end, jnp.zeros_like(end))

    def visible(self, row: Any, key: Any, n_keys: int) -> Any:
        """Which keys from `key` on the 64 tokens from `row` on see: bool[64, n_keys]."""
        own = self._own(row)
        first, last = (jnp.broadcast_to(x, own.shape) for x in (-self.first_key, self.last))
        if self.window is not None:
            first = lax.max(own - (self.window - 1), first)
        count = lax.max(lax.min(own, last) - first + 1, jnp.zeros_like(own))
        shape = (ROWS, n_keys)
        keys = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA)
        # One comparison instead of two: keys before the first one are large without a sign.
        keys = (keys + lax.broadcast_in_dim(key - first, shape, [0])).astype(jnp.uint32)
        return keys < lax.broadcast_in_dim(count, shape, [0]).astype(jnp.uint32)

    def without_padding(self, row: Any, values: Any) -> Any:
        """float32[64, V] of the tokens from `row` on, zeros after the last token."""
        own = lax.broadcast_in_dim(self._own(row), values.shape, [0])
        return jnp.where(own <= self.newest - self.first_key, values, 0.0)

    def _own(self, row: Any) -> Any:
        """Indices of the own keys of the 64 tokens from `row` on."""
        return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + (self.offset + row)


def fill_registers(shape: tuple[int, ...], value: Any) -> Any:
    """float32 [64, columns] or [64] in registers, of one value."""
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else ROW
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def tiles_type(*shape: int) -> Any:
    """bfloat16 in shared memory, as matrix instructions want it."""
    return plgpu.SMEM(shape, jnp.bfloat16, transforms=bfloat16_transforms())


def parts_type(count: int, head: int, value: int) -> Any:
    """Queries of warpgroups in parts of 64 columns, whose places results take afterwards."""
    return tiles_type(2, count, max(head, value) // PART, ROWS, PART)


def _columns(part: int) -> Any:
    return pl.ds(part * PART, PART)


def load_queries(q_ref: Any, parts: Any, arrived: Any) -> None:
    """Starts copies of 64 queries into shared memory; each arrives at a barrier."""
    for part in range(q_ref.shape[-1] // PART):
        plgpu.copy_gmem_to_smem(q_ref.at[:, _columns(part)], parts.at[part], arrived)


def multiply_keys(scores: Any, parts: Any, keys: Any) -> None:
    """Adds products of queries and keys [K, H]."""
    for part in range(keys.shape[-1] // PART):
        plgpu.wgmma(scores, parts.at[part], keys.at[:, _columns(part)].transpose((1, 0)))


def write(acc: Any, total: Any, parts: Any) -> None:
    """Weighted sums, divided by the sums of weights, into shared memory."""
    share = 1.0 / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    acc = (acc * lax.broadcast_in_dim(share, acc.shape, [0])).astype(jnp.bfloat16)
    for part in range(acc.shape[1] // PART):
        parts.at[part][...] = acc[:, part * PART : (part + 1) * PART]
    plgpu.commit_smem()


def store_parts(parts: Any, rows: int, out_ref: Any) -> None:
    """Starts copies of the first rows of a result out of shared memory."""
    for part in range(out_ref.shape[-1] // PART):
        plgpu.copy_smem_to_gmem(parts.at[part, pl.ds(0, rows)], out_ref.at[:, _columns(part)])


def add_product(
    acc: Any, weights: Any, values: Any, scratch: dict[str, Any], meanwhile: Any = lambda: None
) -> Any:
    """acc plus the product of weights in registers and values in shared memory."""

    def multiply(acc_ref: Any, weights: Any) -> None:
        plgpu.wgmma(acc_ref, weights, values)
        meanwhile()

    if "weights" not in scratch:
        start = plgpu.WGMMAAccumulatorRef.init(acc)
        return pl.run_state(functools.partial(multiply, weights=weights))(start)

    # The simulator knows neither operands in registers nor sums that begin with a value.
    def product(acc_ref: Any) -> Any:
        buffer = scratch["weights"].at[lax.axis_index("warpgroup")]
        buffer[...] = weights
        multiply(acc_ref, buffer)
        return acc_ref[...]

    return acc + pl.run_scoped(product, accumulator(acc.shape[1]))
