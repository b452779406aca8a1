"""Shapes for tests and benchmarks: MiMo's linear maps, and awkward ones."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.formats import MXFP4_BLOCK, FP8Array, MXFP4Array

ROWS = (1, 16, 4096)


@dataclasses.dataclass(frozen=True)
class Case:
    """A product with a quantised matrix or stack of matrices.

    Attributes:
      name: for tables.
      format: of the weights.
      weights: shape [F, D] or [C, R, D].
      rows: numbers of activations to multiply with it.
    """

    name: str
    format: Literal["fp8", "mxfp4"]
    weights: tuple[int, ...]
    rows: tuple[int, ...] = ROWS


# MTP blocks have the same attention and feed-forward as the backbone; drafters aren't quantised.
REAL = (
    Case("pro-qkv", "fp8", (8, 3392, 6144), (1, 8, 16, 64, 256, 4096, 8192)),
    Case("pro-qkv-quarter", "fp8", (2, 3392, 6144)),
    Case("pro-gate", "fp8", (16384, 6144)),
    Case("pro-gate-quarter", "fp8", (4096, 6144)),
    Case("pro-down", "fp8", (6144, 16384)),
    Case("pro-down-quarter", "fp8", (6144, 4096)),
    Case("flash-qkv", "fp8", (4, 3392, 4096)),
    Case("flash-qkv-sliding", "fp8", (4, 3712, 4096)),
    Case("flash-gate", "fp8", (16384, 4096)),
    Case("flash-down", "fp8", (4096, 16384)),
    Case("pro-expert", "mxfp4", (2048, 6144)),
)

# Sizes off the tiles, one tile, an odd number of tiles, and stacks whose matrices end in half a
# block of scales.
AWKWARD = (
    Case("one-tile", "fp8", (64, 128), (1, 8)),
    Case("half-block", "fp8", (3, 192, 384), (1, 5, 17)),
    Case("off-tiles", "fp8", (70, 200), (3, 130)),
    Case("odd-tiles", "fp8", (320, 640), (9,)),
    Case("one-tile-mxfp4", "mxfp4", (128, 128), (1, 8)),
    Case("stack-mxfp4", "mxfp4", (2, 128, 384), (5, 17)),
    Case("off-tiles-mxfp4", "mxfp4", (70, 96), (3, 130)),
)


def weights(case: Case, seed: int) -> FP8Array | MXFP4Array:
    """Random weights, whose FP8 codes are finite."""
    rng = np.random.default_rng(seed)
    *lead, rows, columns = case.weights
    if case.format == "mxfp4":
        codes = rng.integers(0, 256, (*lead, rows, columns // 2), np.uint8)
        scales = rng.integers(117, 122, (*lead, rows, columns // MXFP4_BLOCK), np.uint8)
        return MXFP4Array(jnp.asarray(codes), jnp.asarray(scales))
    bits = rng.integers(0, 256, case.weights, np.uint8)
    bits[bits & 0x7F == 0x7F] = 0
    codes = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float8_e4m3fn)
    scales = rng.uniform(0.01, 0.02, (*lead, -(-rows // 128), -(-columns // 128)))
    return FP8Array(codes, jnp.asarray(scales, jnp.float32))


def activations(case: Case, rows: int, seed: int) -> Float[Array, "T D"]:
    """Random activations, bfloat16."""
    rng = np.random.default_rng(seed + rows)
    return jnp.asarray(rng.standard_normal((rows, case.weights[-1])), jnp.bfloat16)
