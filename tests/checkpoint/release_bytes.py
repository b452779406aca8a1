"""Bytes of the published storage formats and what they mean, from MODEL_SPEC 5 alone."""

from __future__ import annotations

import dataclasses
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np

BLOCK = 128


@dataclasses.dataclass
class Tensor:
    """A tensor of a safetensors file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file, tensors in the given order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, t in tensors.items():
        offsets = [offset, offset + len(t.data)]
        header[name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": offsets}
        offset += len(t.data)
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + b"".join(t.data for t in tensors.values())


def torch_bytes(mask_token_id: int, embedding: bytes) -> bytes:
    """A torch file as the golden one is laid out: {"mask_token_id": id, "embedding": bfloat16}."""

    def text(s: str) -> bytes:
        return b"X" + struct.pack("<I", len(s)) + s.encode()

    size = len(embedding) // 2
    count = b"M" + struct.pack("<H", size)
    pickle = (
        b"\x80\x02}q\x00("
        + text("mask_token_id")
        + (b"J" + struct.pack("<i", mask_token_id))
        + text("embedding")
        + b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + text("storage")
        + b"ctorch\nBFloat16Storage\n"
        + text("0")
        + text("cpu")
        + count
        + b"tQK\x00"
        + count
        + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRu."
    )
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("mask_embedding/data.pkl", pickle)
        archive.writestr("mask_embedding/byteorder", "little")
        archive.writestr("mask_embedding/data/0", embedding)
        archive.writestr("mask_embedding/version", "3\n")
    return file.getvalue()


def e4m3_table() -> np.ndarray:
    """float32 [256] of float8_e4m3fn: sign, four exponent bits (bias 7), three mantissa bits."""
    values = []
    for byte in range(256):
        sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
        magnitude = (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa / 8 * 2**-6
        values.append((-1) ** sign * (np.nan if byte & 127 == 127 else magnitude))
    return np.array(values, np.float32)


E4M3 = e4m3_table()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


Place = tuple[str, int]


def qkv_places(
    q: int, k: int, v: int, chunks: int, how: str
) -> tuple[dict[str, int], dict[str, int], dict[str, list[tuple[Place, Place]]]]:
    """Where each row of Q, K and V is stored: rows of tensors, and of their scales.

    Returns:
      Rows of each tensor, scale rows of each, and for each row of q, k and v (in head order) the
      tensor and row of its codes and of its scales.
    """
    total = {"q": q, "k": k, "v": v}
    if how == "plain":
        chunks = 1
    each = {p: n // chunks for p, n in total.items()}
    if how in ("interleaved", "plain"):
        size = sum(each.values())
        begin = {"q": 0, "k": each["q"], "v": each["q"] + each["k"]}
        places = {}
        for p, n in total.items():
            places[p] = []
            for r in range(n):
                chunk, local = r // each[p], begin[p] + r % each[p]
                scale_row = chunk * ceil(size) + local // BLOCK
                places[p].append((("qkv_proj", chunk * size + local), ("qkv_proj", scale_row)))
        return {"qkv_proj": q + k + v}, {"qkv_proj": chunks * ceil(size)}, places
    sizes = {f"{p}_proj": n for p, n in total.items()}
    places = {
        p: [((f"{p}_proj", r), (f"{p}_proj", r // BLOCK)) for r in range(n)]
        for p, n in total.items()
    }
    scale_sizes = {f"{p}_proj": ceil(n) for p, n in total.items()}
    if how == "split_own":
        return sizes, scale_sizes, places
    # Quirk A: keys and values of a chunk were quantised one below the other; the blocks that begin
    # with key rows are stored with the keys, the rest with the values.
    with_k = ceil(each["k"])
    with_v = ceil(each["k"] + each["v"]) - with_k
    for p, first in (("k", 0), ("v", each["k"])):
        places[p] = []
        for r in range(total[p]):
            chunk, block = r // each[p], (first + r % each[p]) // BLOCK
            if block < with_k:
                scale = ("k_proj", chunk * with_k + block)
            else:
                scale = ("v_proj", chunk * with_v + block - with_k)
            places[p].append(((f"{p}_proj", r), scale))
    return sizes, scale_sizes | {"k_proj": chunks * with_k, "v_proj": chunks * with_v}, places


def fp8_rows(codes: np.ndarray, scales: np.ndarray, rows: list[int], at: list[int]) -> np.ndarray:
    """float32 rows: the codes of `rows`, each times the scale row `at` the same position."""
    dense = np.empty((len(rows), codes.shape[1]), np.float32)
    for i, (row, scale_row) in enumerate(zip(rows, at, strict=True)):
        for c in range(0, codes.shape[1], BLOCK):
            dense[i, c : c + BLOCK] = (
                E4M3[codes[row, c : c + BLOCK]] * scales[scale_row, c // BLOCK]
            )
    return dense


def ceil(size: int) -> int:
    """128-blocks that cover so many rows or columns."""
    return -(-size // BLOCK)


def encode(values: np.ndarray, dtype: str) -> tuple[Tensor, np.ndarray]:
    """A tensor of float32 values cut to `dtype`, and the values that are left."""
    bits = values.astype(np.float32).view(np.uint32)
    if dtype == "BF16":
        short = (bits >> 16).astype(np.uint16)
        left = (short.astype(np.uint32) << 16).view(np.float32)
        return Tensor("BF16", values.shape, short.tobytes()), left
    return Tensor("F32", values.shape, values.astype(np.float32).tobytes()), values
