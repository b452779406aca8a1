"""Storing the keys and values of successive tokens in a cache on TPUs, in place.

XLA has a cache whose heads are no multiple of 128 wide with its slots last (`Layout`), and copies
all of it into another layout and back where several tokens are stored at once.  Here a program
reads, changes and writes one block of a sequence's slots, in the layout in which the kernels of
attention read them.  Rotation and scaling are left to XLA.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Int32

from pallas_kernels import mosaic_tpu
from pallas_kernels.attention.mosaic_tpu_parts import Layout, refused_widths
from pallas_kernels.mosaic_tpu import LANES, SUBLANES
from pallas_kernels.rotate_and_store.reference import Heads, split


def unsupported(fused: Any, k_cache: Any, heads: Heads, ring: bool) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    tokens, (slots, kv_heads) = fused.shape[1], k_cache.shape[1:3]
    if k_cache.dtype != jnp.bfloat16:
        return f"a cache of {k_cache.dtype} is not bfloat16"
    if reason := refused_widths(heads.head, heads.value):
        return reason
    if slots < LANES or (ring and slots % LANES):
        of = "at least" if slots < LANES else "a multiple of"
        return f"{slots} slots: there must be {of} {LANES}"
    if ring and tokens > slots - LANES:
        return f"{tokens} tokens are more than {slots - LANES} of the ring's {slots} slots"
    # Two blocks of new tokens, the old and the changed one, each twice; and float32 of a head.
    block = LANES * kv_heads * max(heads.head, heads.value) * k_cache.dtype.itemsize
    if 8 * block > mosaic_tpu.vmem_bytes() // 2:
        return f"{kv_heads} KV heads of {heads.head} are more than fit in VMEM together"
    return None


def rotate_and_store(
    fused: Float[Array, "B T C R"],
    positions: Int[Array, "B T"],
    k_cache: Float[Array, "B S K H"],
    v_cache: Float[Array, "B S K V"],
    *,
    heads: Heads,
    ring: bool,
    interpret: Any = False,
) -> tuple[Float[Array, "B T K G H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """`reference.rotate_and_store`, in place if the caches are donated.

    Args:
      fused, positions, k_cache, v_cache, heads, ring: see there.
      interpret: False, True, or `pltpu.InterpretParams`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(fused, k_cache, heads, ring):
        raise NotImplementedError(reason)
    q, k, v = split(fused, positions, heads)
    put = functools.partial(store, positions=positions, ring=ring, interpret=interpret)
    return q, put(k_cache, k), put(v_cache, v)


def store(
    cache: Float[Array, "B S K H"],
    new: Float[Array, "B T K H"],
    positions: Int[Array, "B T"],
    *,
    ring: bool,
    interpret: Any = False,
) -> Float[Array, "B S K H"]:
    """`reference.store`, in place if the cache is donated."""
    batch, tokens, heads, width = new.shape
    layout = Layout(heads, width, LANES)
    if not layout.columns and tokens < LANES:
        layout = Layout(heads, width, max(SUBLANES, pl.next_power_of_2(tokens)))
    n, slots = layout.block, cache.shape[1]
    new = jnp.pad(new.astype(cache.dtype), ((0, 0), (0, -tokens % n), (0, 0), (0, 0)))
    pieces = new.shape[1] // n
    scalars = _places(positions, n, None if ring else slots)

    def old(b: Any, j: Any, *scalars: Any) -> tuple[Any, Any]:
        block = _block(scalars, b, j)
        return b, jax.lax.rem(block, slots // n) if ring else block

    def piece(b: Any, j: Any, *scalars: Any, before: int) -> tuple[Any, Any]:
        return b, jnp.clip(_block(scalars, b, j) - scalars[2][b] - before, 0, pieces - 1)

    view = layout.view(cache)
    # A block of slots has tokens of two pieces, if there are as many.
    sources = [layout.spec(functools.partial(piece, before=i)) for i in range(min(pieces, 2))]
    view = pl.pallas_call(
        functools.partial(_kernel, layout=layout),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(batch, pl.cdiv(tokens - 1, n) + 1),
            in_specs=[*sources, layout.spec(old)],
            out_specs=layout.spec(old),
        ),
        out_shape=jax.ShapeDtypeStruct(view.shape, view.dtype),
        input_output_aliases={len(scalars) + len(sources): 0},
        compiler_params=mosaic_tpu.compiler_params("parallel", "arbitrary"),
        interpret=interpret,
        name="store",
    )(*scalars, *[layout.view(new)] * len(sources), view)
    return layout.unview(view)


def _places(
    positions: Int[Array, "B T"], n: int, slots: int | None
) -> tuple[Int32[Array, " B"], ...]:
    """Where tokens belong, as if they were stored one after the other from position 0 on.

    Args:
      positions: as of `reference.store`.
      n: slots of a block.
      slots: of a cache that is no ring.

    Returns:
      For each sequence: the first and the last block with tokens; the block of token 0, which may
      be padding, and its slot in there; the first token that is stored and the one after the last.
    """
    positions = positions.astype(jnp.int32)
    there = positions >= 0
    low = jnp.argmax(there, axis=1).astype(jnp.int32)
    zero = jnp.where(there.any(axis=1), jnp.max(positions, axis=1) + 1 - there.sum(axis=1), 0) - low
    high = low + there.sum(axis=1, dtype=jnp.int32)
    if slots is not None:
        high = jnp.minimum(high, slots - zero)
    some = low < high
    first, last = (jnp.where(some, (zero + t) // n, 0) for t in (low, high - 1))
    return first, last, zero // n, zero % n, low, high


def _block(scalars: Sequence[Any], b: Any, j: Any) -> Any:
    """The block of a program.  Some come twice, one after the other, which changes nothing."""
    return jnp.minimum(scalars[0][b] + j, scalars[1][b])


def _kernel(*refs: Any, layout: Layout) -> None:
    scalars, (*sources, old_ref, out_ref) = refs[:6], refs[6:]
    new_ref, before_ref = sources[0], sources[-1]
    b, j = pl.program_id(0), pl.program_id(1)
    _, _, piece, shift, low, high = (ref[b] for ref in scalars)
    # Slot i has token start + i: of this piece from slot `shift` on, and else of the one before.
    start = (_block(scalars, b, j) - piece) * layout.block - shift

    if layout.apart:
        out_ref[...] = old_ref[...]

        def put(i: Any, _: None) -> None:
            stored = (start + i >= low) & (start + i < high)

            @pl.when(stored & (i >= shift))
            def _() -> None:
                out_ref[i] = new_ref[i - shift]

            @pl.when(stored & (i < shift))
            def _() -> None:
                out_ref[i] = before_ref[i - shift + layout.block]

        jax.lax.fori_loop(0, layout.block, put, None)
        return

    axis = 1 if layout.columns else 0
    slot = jax.lax.broadcasted_iota(jnp.int32, layout.matrices[1:], axis)
    stored = (start + slot >= low) & (start + slot < high)

    def put_head(h: Any, _: None) -> None:
        # Registers are rotated as 32-bit numbers.
        parts = [pltpu.roll(ref[h].astype(jnp.float32), shift, axis) for ref in sources]
        new = jnp.where(slot >= shift, parts[0], parts[-1]).astype(out_ref.dtype)
        out_ref[h] = jnp.where(stored, new, old_ref[h])

    jax.lax.fori_loop(0, layout.heads, put_head, None)
