"""Quantised weights as checkpoints store them (MXFP4 and block-FP8), as pytrees.

Both types hold exactly the bytes of the checkpoint, so saving what was loaded is bit-exact:

- `FP8Array`: float8_e4m3fn codes with one float32 multiplier for each 128 x 128 block.
- `MXFP4Array`: two e2m1 codes a byte with one E8M0 exponent byte for each 32 columns of a row
  (OCP Microscaling Formats, version 1.0).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

FP8_BLOCK = 128
MXFP4_BLOCK = 32
MXFP4_NAN_SCALE = 255


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Array:
    """A matrix (or stack) in block-FP8: W[r, c] = codes[r, c] * scales[r // 128, c // 128].

    Attributes:
      codes: float8_e4m3fn [..., R, C].
      scales: float32 [..., ceil(R / 128), ceil(C / 128)]; the checkpoint's `weight_scale_inv`,
        a multiplier despite the name.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is represented."""
        return tuple(self.codes.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MXFP4Array:
    """A matrix (or stack) in MXFP4: W[r, c] = e2m1(code[r, c]) * 2 ** (scales[r, c // 32] - 127).

    Attributes:
      codes: uint8 [..., R, C / 2]; byte j holds column 2j in its low and 2j + 1 in its high nibble.
      scales: uint8 [..., R, C / 32]; the checkpoint's `weight_scale`, exponents and not numbers.
    """

    codes: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix that is represented."""
        return (*self.codes.shape[:-1], 2 * self.codes.shape[-1])


QuantizedArray = FP8Array | MXFP4Array

# Rows and columns of the weights that an element stands for: of the codes, and of the scales.
BLOCKS: dict[type, tuple[tuple[int, int], tuple[int, int]]] = {
    FP8Array: ((1, 1), (FP8_BLOCK, FP8_BLOCK)),
    MXFP4Array: ((1, 2), (1, MXFP4_BLOCK)),
}
