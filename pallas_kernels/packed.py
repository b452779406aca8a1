"""Quantised weights repacked for kernels, in whichever order these want."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import columns, words
from pallas_kernels.columns import FP8Columns, MXFP4Columns
from pallas_kernels.formats import FP8Array, MXFP4Array
from pallas_kernels.words import FP8Words, MXFP4Words

Packed = MXFP4Words | FP8Words | MXFP4Columns | FP8Columns


def pack(
    w: FP8Array | MXFP4Array, kernels: tuple[str, ...], *, native_e2m1: bool = False
) -> Packed:
    """The weights in the order of some kernels; call `unpackable` first.

    Works on one device's arrays (or in `shard_map` on each device's part).

    Args:
      w: the weights.
      kernels: backends from `backends.resolve`.
      native_e2m1: the device's vector unit converts e2m1 (`mosaic_tpu.converts_e2m1`).
    """
    if for_tpu(kernels):
        return columns.pack(w, kernels, native=native_e2m1)
    return words.pack(w, kernels)


def unpackable(w: FP8Array | MXFP4Array, kernels: tuple[str, ...]) -> Array:
    """Whether weights hold what can't be packed for these kernels: bool[]."""
    return (columns if for_tpu(kernels) else words).unpackable(w)


def unpack(w: Packed) -> FP8Array | MXFP4Array:
    """What was packed, bit for bit."""
    return columns.unpack(w) if isinstance(w, MXFP4Columns | FP8Columns) else words.unpack(w)


def refused(x: Any, w: Any, *kinds: type) -> str | None:
    """Why kernels for bfloat16 activations and weights of some kinds can't do a case, if so.

    Args:
      x: activations, or their shape.
      w: weights, or their shapes.
      kinds: those of `Packed` that the kernels take.
    """
    if not isinstance(w, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        return f"the weights are not packed as {names} but {type(w).__name__}"
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype}, and the kernels take bfloat16"
    return None


def placed(like: Packed, rows: jax.P, scales: jax.P) -> Packed:
    """Where packed weights are on a mesh, as partition specs in the place of the arrays.

    Args:
      like: the weights, or their shapes.
      rows: of the codes before packing, an entry a dimension.
      scales: of the scales.
    """
    if isinstance(like, MXFP4Columns | FP8Columns):
        *lead, row, column = rows
        order = jax.P(*lead, column, None, row)
        return like.with_arrays(order, order)
    inner = (None,) * (like.scales.ndim - len(scales))
    return like.with_arrays(jax.P(*rows, None, None), jax.P(*scales, *inner))


def for_tpu(kernels: tuple[str, ...]) -> bool:
    """Whether weights are packed for TPUs, and not for GPUs."""
    return "mosaic_tpu" in kernels and not {"mosaic_gpu", "triton"} & set(kernels)
