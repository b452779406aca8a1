"""What the Mosaic GPU kernels share: decoding of words in a warpgroup's registers.

A tile of 16-bit words that is loaded in the layout of a matrix instruction's bfloat16 operand is
decoded in place: each 32-bit register of two words becomes one of two values for each code, and
nothing moves between threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.words import GROUPS, PTX_PLACE, TILE_COLUMNS, TILE_ROWS, decode_mxfp4

WORDS = TILE_COLUMNS // GROUPS  # a row of a tile
ROW = plgpu.Layout.WGMMA.reduce(1)
SHARED_MEMORY = 232448 - 1024  # bytes that a program may have, less what barriers take


def words_transforms() -> tuple[Any, ...]:
    """How words lie in shared memory, so that a warp's loads meet no bank conflicts."""
    return _tiles(WORDS, 2 * WORDS)


def bfloat16_transforms() -> tuple[Any, ...]:
    """How bfloat16 operands and results of matrix instructions lie in shared memory."""
    return _tiles(64, 128)


def _tiles(columns: int, swizzle_bytes: int) -> tuple[Any, ...]:
    # Abstract to pyright, which doesn't see that jax completes them.
    tiling, swizzle = (getattr(plgpu, f"{name}Transform") for name in ("Tiling", "Swizzle"))
    return tiling((8, columns)), swizzle(swizzle_bytes)


def accumulator(columns: int) -> Any:
    """Scoped float32[64, columns] in registers, that a matrix instruction adds to."""
    return plgpu.WGMMAAccumulatorRef((TILE_ROWS, columns), jnp.float32)


def load_mxfp4(words_ref: Any, scales_ref: Any, *, interpret: bool) -> tuple[Any, Any]:
    """A tile of `MXFP4Words` from shared memory into registers: uint16[64, 32] and uint32[64]."""
    if interpret:
        loaded = words_ref[...], scales_ref[...]
        # The simulator wants a fence between loads and a copy that then overwrites; like jax's own
        # pipelines, the kernels have none, since what was loaded is used before buffers are free.
        plgpu.commit_smem()
        return loaded
    words = plgpu.load(words_ref, layout=plgpu.Layout.WGMMA)
    return words, plgpu.load(scales_ref, layout=ROW)


def decode(words: Any, scales: Any, codes: range = range(GROUPS), *, interpret: bool) -> Any:
    """bfloat16[64, 32 n], the columns of n of the four codes of a tile in registers."""
    if interpret:
        return jnp.concatenate([decode_mxfp4(words, scales, j) for j in codes], axis=-1)
    shape = (TILE_ROWS, WORDS * len(codes))

    def in_registers(ctx: Any, words: Any, scales: Any) -> Any:
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        layout = words.layout
        decoded = np.empty(layout.registers_shape(shape), dtype=object)
        row_of = _half_of_row(decoded.shape)
        # Both halves of a register have the byte j of the scales, where bfloat16 has its exponent.
        exponents = {
            (half, j): _asm(
                i32,
                f"{{ .reg .b32 t; prmt.b32 t, $1, 0, 0x4{j}4{j}; shl.b32 $0, t, 7; }}",
                mgpu.utils.bitcast(scale, i32),
            )
            for half, scale in enumerate(scales.registers.flat)
            for j in codes
        }
        for at, register in np.ndenumerate(words.registers):
            for n, j in enumerate(codes):
                value = _asm(
                    i32,
                    f"{{ .reg .b32 t; {PTX_PLACE[j]} mul.rn.bf16x2 $0, t, $2; }}",
                    mgpu.utils.bitcast(register, i32),
                    exponents[row_of(at), j],
                )
                to = (at[0], at[1] + n * words.registers.shape[1], *at[2:])
                decoded[to] = mgpu.utils.bitcast(value, pair)
        weights = mgpu.FragmentedArray(_registers=decoded, _layout=layout, _is_signed=None)
        return mgpu.optimization_barrier(weights)  # Decoding stays where it is written.

    result = plgpu.ShapeDtypeStruct(shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    inlined: Any = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, ROW), return_type=result)
    return inlined(in_registers)(words, scales)


def _half_of_row(shape: tuple[int, ...]) -> Callable[[tuple[int, ...]], int]:
    """Which of a thread's two rows a register belongs to: its index at the one place that has 2."""
    places = [axis for axis, size in enumerate(shape) if size == 2 and axis >= 2]
    assert len(places) == 1, shape
    return lambda at: at[places[0]]


def _asm(result: Any, code: str, *operands: Any) -> Any:
    constraints = ",".join(["=r", *(["r"] * len(operands))])
    return llvm.inline_asm(result, list(operands), code, constraints, has_side_effects=False)
