"""Products with quantised weights on TPUs.

Weights are decoded where they are used, so their packed bytes are what is read.  One block of
columns at a time goes with all rows: with few rows each weight is read once, with many it is read
and decoded once for each block of rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import mosaic_tpu
from pallas_kernels.columns import CHUNK, Columns, FP8Columns, MXFP4Columns
from pallas_kernels.filling import filled
from pallas_kernels.packed import refused


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Sizes of the blocks of a product.

    Attributes:
      rows: of activations.
      columns: of the product.
      chunks: of 256 summed columns.
    """

    rows: int
    columns: int
    chunks: int


def choose_blocks(tokens: int, w: Columns) -> Blocks:
    """Blocks that fit in VMEM twice, so that one is loaded while another is used."""
    vmem = mosaic_tpu.vmem_bytes()
    columns = mosaic_tpu.block_columns(w.words.shape[-1], 1024 if tokens > 64 else 2048)
    chunks = mosaic_tpu.block_chunks(w, columns, vmem // 16)
    rows = min(mosaic_tpu.padded_rows(tokens), 512)
    while rows > 128 and 2 * rows * chunks * CHUNK > vmem // 8:
        rows //= 2
    return Blocks(rows, columns, chunks)


def unsupported(x: Any, w: Any) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    if reason := refused(x, w, FP8Columns, MXFP4Columns):
        return reason
    if w.ndim not in (2, 3):
        return f"weights have {w.ndim} dimensions and not 2 or 3"
    return None


def quantized_matmul(
    x: Float[Array, "T D"], w: Any, *, interpret: Any = False, blocks: Blocks | None = None
) -> Float[Array, "T ..."]:
    """x W^T, as `reference.quantized_matmul`.

    Args:
      x: activations, bfloat16.
      w: `Columns` [F, D], or [C, R, D] whose product ends in C, R.
      interpret: False, True, or `pltpu.InterpretParams`.
      blocks: None for those of `choose_blocks`.

    Raises:
      NotImplementedError: `unsupported` says why.
    """
    reason = unsupported(x, w)
    if reason is not None:
        raise NotImplementedError(reason)
    tokens, stacked, rows = x.shape[0], w.ndim == 3, w.shape[-2]
    if not stacked:
        w = jax.tree.map(lambda a: a[None], w)
    x = filled(x, mosaic_tpu.padded_rows(tokens), w.padded[1])
    product = _product(x, w, blocks or choose_blocks(tokens, w), interpret)
    product = product[:, :tokens, :rows]
    return jnp.swapaxes(product, 0, 1) if stacked else product[0]


def _product(x: Array, w: Columns, b: Blocks, interpret: Any) -> Array:
    """[C, T, F] of x [T, D] and weights [C, F, D]."""
    copies, chunks, sublanes, n = w.words.shape
    steps = chunks // b.chunks

    def kernel(x_ref: Any, words: Any, scales: Any, out: Any, total: Any) -> None:
        step = pl.program_id(3)

        @pl.when(step == 0)
        def _() -> None:
            total[...] = jnp.zeros_like(total)

        mosaic_tpu.accumulate(x_ref, [(w, words, scales, total)])

        @pl.when(step == steps - 1)
        def _() -> None:
            out[...] = total[...].astype(out.dtype)

    def weights(sublanes: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, b.chunks, sublanes, b.columns), lambda c, j, i, k: (c, k, 0, j))

    return pl.pallas_call(
        kernel,
        grid=(copies, pl.cdiv(n, b.columns), pl.cdiv(x.shape[0], b.rows), steps),
        in_specs=[
            pl.BlockSpec((b.rows, b.chunks * CHUNK), lambda c, j, i, k: (i, k)),
            weights(sublanes),
            weights(2),
        ],
        out_specs=pl.BlockSpec((None, b.rows, b.columns), lambda c, j, i, k: (c, i, j)),
        out_shape=jax.ShapeDtypeStruct((copies, x.shape[0], n), x.dtype),
        scratch_shapes=[pltpu.VMEM((b.rows, b.columns), jnp.float32)],
        compiler_params=mosaic_tpu.compiler_params(
            "parallel", "parallel", "arbitrary", "arbitrary"
        ),
        interpret=interpret,
        name="quantized_matmul",
    )(x, w.words, w.scales)
