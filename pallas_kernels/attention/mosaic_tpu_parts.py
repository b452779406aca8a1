"""Softmax attention over blocks of keys on TPUs: the kernel of `attention` and `decode_attention`.

A program has some tokens of a sequence with all their heads, and goes through blocks of keys, each
of all KV heads.  The query heads of a KV head are rows beside those of other tokens, so keys are
read once for all of them.

Keys and values are read in the layout in which XLA stores arrays [B, S, K, H] on TPUs, since it
would copy a cache into any other.  That is as written if H is a multiple of 128.  Else H would be
padded, and XLA stores [B, K, H, S] (jax 0.11.2), in which a block of keys is columns.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import mosaic_tpu
from pallas_kernels.mosaic_tpu import LANES, SUBLANES

LOWEST = -1e30  # a score that counts for nothing, however small the others
EMPTY = -1e20  # the largest score so far, before there is one
NOWHERE = 2**31 - 1  # a position that no token sees
LOG2E = math.log2(math.e)
# Rows of all KV heads up to which these are interleaved: a head alone waits for its own results.
INTERLEAVED_ROWS = 1024


class Visible(abc.ABC):
    """What tokens see.

    Methods get the scalars that were prefetched, then a sequence and a block of its tokens.
    """

    @abc.abstractmethod
    def blocks(self, scalars: Sequence[Any], b: Any, i: Any) -> tuple[Any, Any]:
        """The first block of keys that any of the tokens sees, and the one after the last."""

    @abc.abstractmethod
    def whole(self, scalars: Sequence[Any], b: Any, i: Any, block: Any) -> Any:
        """Whether all tokens see all keys of a block; None if that can't be."""

    @abc.abstractmethod
    def bounds(self, scalars: Sequence[Any], b: Any, i: Any, token: Array) -> tuple[Array, Array]:
        """The first and the last position that tokens see, given their places in the block."""

    @abc.abstractmethod
    def held(self, scalars: Sequence[Any], b: Any, key: Array) -> Array:
        """The positions of keys."""


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of a call.

    Attributes:
      tokens: of a program.
      keys: all of them, or a multiple of 128.
    """

    tokens: int
    keys: int


def refused(q: Any, k: Any, v: Any) -> str | None:
    """Why dtypes or heads can't be done; None if they can."""
    if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
        return f"{q.dtype}, {k.dtype} and {v.dtype} are not all bfloat16"
    head, width = q.shape[-1], v.shape[-1]
    if reason := refused_widths(head, width):
        return reason
    if LANES * _key_bytes(k, v) > _key_memory():
        return f"{k.shape[2]} KV heads of {head} and {width} are more than fit in VMEM together"
    return None


def refused_widths(head: int, width: int) -> str | None:
    """Why keys and values of these widths have no `Layout` for kernels; None if they have."""
    if head % SUBLANES or width % SUBLANES:
        return f"heads of {head} and {width}: both must be multiples of {SUBLANES}"
    return None


def key_block(k: Any, v: Any, limit: int) -> int:
    """Keys that make a block.

    Args:
      k, v: keys and values [B, S, K, H].
      limit: 128 times a power of 2.

    Returns:
      S if it is at most `limit`, and otherwise `limit`, or less if VMEM doesn't suffice.
    """
    while limit > LANES and limit * _key_bytes(k, v) > _key_memory():
        limit //= 2
    return min(limit, k.shape[1])


def _key_bytes(k: Any, v: Any) -> int:
    # One block is loaded while another is used, of which there is a copy in another order.
    return 3 * k.shape[2] * (k.shape[3] + v.shape[3]) * k.dtype.itemsize


def _key_memory() -> int:
    return mosaic_tpu.vmem_bytes() // 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How keys or values [B, S, K, H] lie in memory.

    Attributes:
      heads, width: K and H.
      block: keys that are loaded together.
    """

    heads: int
    width: int
    block: int

    @property
    def columns(self) -> bool:
        """As [B, K, H, S]."""
        return self.width % LANES != 0

    @property
    def apart(self) -> bool:
        """As [B, S, K, H], where the rows of a head lie apart; otherwise they are a matrix."""
        return not self.columns and self.heads > 1

    @property
    def matrices(self) -> tuple[int, int, int]:
        """Shape of a block as a matrix for each head."""
        matrix = (self.width, self.block) if self.columns else (self.block, self.width)
        return self.heads, *matrix

    def view(self, a: Array) -> Array:
        """The array in the order in which it lies in memory."""
        return a if self.apart else a.transpose((0, 2, 3, 1) if self.columns else (0, 2, 1, 3))

    def unview(self, a: Array) -> Array:
        """The array of a `view`."""
        return a if self.apart else a.transpose((0, 3, 1, 2) if self.columns else (0, 2, 1, 3))

    def spec(self, index: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        """Blocks of the view; `index` maps a program to a sequence and a block of its keys."""

        def at(*program: Any) -> tuple[Any, ...]:
            b, block = index(*program)
            if self.columns:
                return b, 0, 0, block
            return (b, block, 0, 0) if self.apart else (b, 0, block, 0)

        shape = (self.block, self.heads, self.width) if self.apart else self.matrices
        return pl.BlockSpec((None, *shape), at)

    def separate(self, ref: Any, matrices: Any) -> None:
        """Makes a matrix of the rows of each head, in a kernel."""
        if self.heads % 2:
            matrices[...] = jnp.swapaxes(ref[...], 0, 1)
            return
        # Words of two heads each: moving those takes half the time.
        pairs = jnp.swapaxes(pltpu.bitcast(ref[...], jnp.uint32), 0, 1)
        for i, bits in enumerate((pairs << 16, pairs & jnp.uint32(0xFFFF0000))):
            for pair in range(self.heads // 2):
                matrices[2 * pair + i] = pltpu.bitcast(bits[pair], jnp.float32).astype(jnp.bfloat16)

    def filled(self, matrix: Array, count: Any) -> Array:
        """A head's matrix with zeros after so many keys, where the array has ended."""
        key = jax.lax.broadcasted_iota(jnp.int32, matrix.shape, 1 if self.columns else 0)
        return jnp.where(key < count, matrix, jnp.zeros_like(matrix))


def attend(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    sink: Float[Array, "K G"] | None,
    visible: Visible,
    scalars: Sequence[Int[Array, " _"]],
    *,
    key_blocks: Any,
    blocks: Blocks,
    interpret: Any,
    name: str,
) -> Float[Array, "B T K G V"]:
    """Softmax attention over the keys that each token sees; zeros if there are none.

    Args:
      q, k, v: bfloat16.
      sink: a logit a query head that takes part in the normaliser.
      visible: what tokens see.
      scalars: int32, for its methods.
      key_blocks: the most blocks that any program goes through; may be traced.
      blocks: their sizes.
      interpret: False, True, or `pltpu.InterpretParams`.
      name: of the kernel.
    """
    batch, tokens, heads, group, head = q.shape
    width, rows = v.shape[-1], blocks.tokens * group
    layouts = [Layout(heads, n, blocks.keys) for n in (head, width)]
    programs = pl.cdiv(tokens, blocks.tokens)
    if sink is None:
        sink = jnp.full((heads, group), -jnp.inf)
    # Sums begin with the sink.  EMPTY is finite, and so are differences to it.
    start = jnp.maximum(sink.astype(jnp.float32) * LOG2E, EMPTY)
    start = jnp.broadcast_to(start[..., None], (heads, group, LANES))

    def of_tokens(columns: int) -> pl.BlockSpec:
        shape = (None, blocks.tokens, heads, group, columns)
        return pl.BlockSpec(shape, lambda b, i, j, *_: (b, i, 0, 0, 0))

    def of_keys(b: Any, i: Any, j: Any, *scalars: Any) -> tuple[Any, Any]:
        first, end = visible.blocks(scalars, b, i)
        # Where there are no more, what the next tokens begin with, so that it is there in time.
        new = i + 1 == programs
        next_b = jnp.where(new, jnp.minimum(b + 1, batch - 1), b)
        following, _ = visible.blocks(scalars, next_b, jnp.where(new, 0, i + 1))
        used = first + j < end
        return jnp.where(used, b, next_b), jnp.where(used, first + j, following)

    return pl.pallas_call(
        functools.partial(_kernel, visible=visible, layouts=layouts, keys=k.shape[1]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, programs, key_blocks),
            in_specs=[
                of_tokens(head),
                *(layout.spec(of_keys) for layout in layouts),
                pl.BlockSpec((heads, group, LANES), lambda *_: (0, 0, 0)),
            ],
            out_specs=of_tokens(width),
            scratch_shapes=[
                _Sums(*(pltpu.VMEM((heads, rows, n), jnp.float32) for n in (LANES, LANES, width))),
                [pltpu.VMEM(x.matrices, k.dtype) if x.apart else None for x in layouts],
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, heads, group, width), q.dtype),
        compiler_params=mosaic_tpu.compiler_params("parallel", "parallel", "arbitrary"),
        interpret=interpret,
        name=name,
    )(*scalars, q, *(layout.view(a) for layout, a in zip(layouts, (k, v))), start)


class _Sums(NamedTuple):
    """References to what each KV head's rows have so far.

    Attributes:
      top: the largest score [K, R, 128], the same in all columns.
      norm: the sum of weights [K, R, 128], likewise.
      total: weighted values [K, R, V].
    """

    top: Any
    norm: Any
    total: Any

    def begin(self, h: Any, start: Float[Array, "R 128"]) -> None:
        """With scores that have no value; EMPTY ones don't count."""
        self.top[h] = start
        self.norm[h] = jnp.where(start > EMPTY, 1.0, 0.0)
        self.total[h] = jnp.zeros(self.total.shape[1:], jnp.float32)

    def add(self, h: Any, scores: Float[Array, "R N"], values: Array, *, columns: bool) -> None:
        """The values [N, V] of some keys, or [V, N] as columns."""
        top = self.top[h]
        higher = jnp.maximum(top, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2(scores - _columns(higher, scores.shape[1]))
        shrink = jnp.exp2(top - higher)
        added = _product(weights.astype(values.dtype), values, 1 if columns else 0)
        self.total[h] = self.total[h] * _columns(shrink, added.shape[1]) + added
        self.norm[h] = self.norm[h] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        self.top[h] = higher

    def mean(self, h: Any) -> Float[Array, "R V"]:
        """The weighted mean of values; zeros where there are none."""
        norm = jnp.maximum(self.norm[h], jnp.finfo(jnp.float32).tiny)
        return self.total[h] / _columns(norm, self.total.shape[2])


def _kernel(*refs: Any, visible: Visible, layouts: Sequence[Layout], keys: int) -> None:
    *scalars, q_ref, k_ref, v_ref, start_ref, out_ref, sums, matrices = refs
    tokens, heads, group, head = q_ref.shape
    rows, n = tokens * group, layouts[0].block
    b, i, j = (pl.program_id(axis) for axis in range(3))
    first, end = visible.blocks(scalars, b, i)
    block = first + j

    def for_heads(f: Callable[[Any], None]) -> None:
        unroll = heads * rows <= INTERLEAVED_ROWS
        jax.lax.fori_loop(0, heads, lambda h, _: f(h), None, unroll=unroll)

    @pl.when(j == 0)
    def _() -> None:
        def begin(h: Any) -> None:
            start = jnp.broadcast_to(start_ref[h][None], (tokens, group, LANES))
            sums.begin(h, start.reshape(rows, LANES))

        for_heads(begin)

    def add(masked: bool) -> None:
        of_heads = []
        for layout, ref, matrix in zip(layouts, (k_ref, v_ref), matrices):
            if layout.apart:
                layout.separate(ref, matrix)
            of_heads.append(matrix if layout.apart else ref)
        low = high = held = jnp.int32(0)
        if masked:
            token = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0) // group
            low, high = visible.bounds(scalars, b, i, token)
            key = block * n + jax.lax.broadcasted_iota(jnp.int32, (1, n), 1)
            held = jnp.where(key < keys, visible.held(scalars, b, key), NOWHERE)

        def add_head(h: Any) -> None:
            k, v = (ref[h] for ref in of_heads)
            q = q_ref[:, h].reshape(rows, head)
            scores = _product(q, k, 0 if layouts[0].columns else 1) * (head**-0.5 * LOG2E)
            if masked:
                scores = jnp.where((held >= low) & (held <= high), scores, LOWEST)
                # Beyond the array may be anything, and zero times that needn't be zero.
                v = layouts[1].filled(v, keys - block * n) if keys % n else v
            sums.add(h, scores, v, columns=layouts[1].columns)

        for_heads(add_head)

    whole = visible.whole(scalars, b, i, block)
    if whole is None:
        pl.when(block < end)(functools.partial(add, True))
    else:
        pl.when((block < end) & whole)(functools.partial(add, False))
        pl.when((block < end) & ~whole)(functools.partial(add, True))

    @pl.when(j == pl.num_programs(2) - 1)
    def _() -> None:
        def finish(h: Any) -> None:
            out_ref[:, h] = sums.mean(h).astype(out_ref.dtype).reshape(tokens, group, -1)

        for_heads(finish)


def _product(a: Array, b: Array, axis: int) -> Array:
    """float32 product of a matrix and one whose `axis` is summed over."""
    dimensions = (((1,), (axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _columns(a: Float[Array, "R 128"], n: int) -> Float[Array, "R _"]:
    """Another number of columns, all of which are the same."""
    if n <= LANES:
        return a[:, :n]
    if n % LANES:
        return jnp.broadcast_to(a[:, :1], (a.shape[0], n))
    return jnp.tile(a, (1, n // LANES))
