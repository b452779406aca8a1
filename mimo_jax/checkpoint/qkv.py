"""Row orders of a fused QKV matrix (MODEL_SPEC 5.2).

In memory a fused matrix is [C, R, D]: C chunks, each with its query, key and value rows, and in
block-FP8 each with scale blocks of its own.  Every layout of the releases is one of these forms up
to a reshape or a concatenation, so codes and scales are never recomputed:

- TP-interleaved: C chunks one after another, scale rows a chunk (quirk B);
- plain [Q; K; V]: C = 1;
- split, with keys and values sharing blocks a chunk (quirk A): C chunks, cut into Q, K and V;
- split, each matrix with its own blocks: any C whose chunks begin and end at block boundaries.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped

from mimo_jax.model.parameters import QKVRows
from mimo_jax.quant import FP8_BLOCK, FP8Array

Matrix = Shaped[np.ndarray, "_ _"]
Triple = tuple[Matrix, Matrix, Matrix]


def blocks(size: int) -> int:
    """FP8 blocks that cover so many rows or columns."""
    return -(-size // FP8_BLOCK)


def total_rows(rows: QKVRows, chunks: int) -> QKVRows:
    """Rows of all chunks together."""
    return QKVRows(rows.q * chunks, rows.k * chunks, rows.v * chunks)


def chunk_rows(total: QKVRows, chunks: int) -> QKVRows:
    """Rows of one of `chunks` equal chunks."""
    return QKVRows(total.q // chunks, total.k // chunks, total.v // chunks)


def fused_scale_rows(total: QKVRows, chunks: int) -> int:
    """Scale rows stored with a fused matrix whose chunks were quantised one by one."""
    return chunks * blocks(total.total // chunks)


def kv_scale_rows(total: QKVRows, chunks: int, *, shared: bool) -> tuple[int, int]:
    """Scale rows stored with the key and with the value matrix of a split layer.

    Args:
      total: rows of the layer.
      chunks: parts in which keys and values were quantised together.
      shared: keys and values of a chunk share their blocks (quirk A); else each matrix has its own.
    """
    if not shared:
        return blocks(total.k), blocks(total.v)
    rows = chunk_rows(total, chunks)
    of_k = blocks(rows.k)
    return chunks * of_k, chunks * (blocks(rows.k + rows.v) - of_k)


def aligned(total: QKVRows, chunks: int) -> bool:
    """Whether Q, K and V of every chunk begin at a block boundary."""
    rows = chunk_rows(total, chunks)
    within = rows.q % FP8_BLOCK == 0 and rows.k % FP8_BLOCK == 0
    return within and (chunks == 1 or rows.v % FP8_BLOCK == 0)


def fuse(parts: Triple, chunks: int) -> Shaped[np.ndarray, "C R D"]:
    """[C, R, D] from Q, K and V in head order (or from their scales)."""
    return np.concatenate([p.reshape(chunks, -1, p.shape[-1]) for p in parts], axis=1)


def unfuse(fused: Shaped[np.ndarray, "C R D"], q: int, k: int) -> Triple:
    """Q, K and V in head order from [C, R, D], of which q and k rows a chunk are Q's and K's."""
    q_part, k_part, v_part = np.split(fused, [q, q + k], axis=1)
    width = fused.shape[-1]
    return q_part.reshape(-1, width), k_part.reshape(-1, width), v_part.reshape(-1, width)


def fuse_fp8(codes: Triple, scales: Triple, chunks: int) -> FP8Array:
    """The chunked form of split FP8 matrices whose blocks do not cross chunks."""
    return FP8Array(fuse(codes, chunks), fuse(scales, chunks))


def unfuse_fp8(w: FP8Array, rows: QKVRows) -> tuple[Triple, Triple]:
    """Codes and scales of Q, K and V; a chunk's query rows must end at a block boundary."""
    codes = unfuse(np.asarray(w.codes), rows.q, rows.k)
    return codes, unfuse(np.asarray(w.scales), rows.q // FP8_BLOCK, blocks(rows.k))


def rechunk_fp8(w: FP8Array, rows: QKVRows, chunks: int) -> FP8Array:
    """The same weights in another number of chunks, in both of which they are `aligned`."""
    return w if w.shape[0] == chunks else fuse_fp8(*unfuse_fp8(w, rows), chunks)
