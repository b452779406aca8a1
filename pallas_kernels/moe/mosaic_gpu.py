"""Experts on packed MXFP4 in Mosaic GPU, for Hopper: one form for few tokens, one for many."""

from __future__ import annotations

from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.moe import mosaic_gpu_few, mosaic_gpu_many
from pallas_kernels.packed import refused
from pallas_kernels.words import MXFP4Words

# Above this many tokens they are sorted by expert.
FEW_TOKENS = 64
ROWS_OF_DOWN = 256  # that a program computes


def unsupported(x: Any, chosen: Any, gate: Any) -> str | None:
    """Why these kernels can't do a case; None if they can."""
    if reason := refused(x, gate, MXFP4Words):
        return reason
    if len(chosen) > FEW_TOKENS and gate.padded[1] % ROWS_OF_DOWN:
        return f"the model's width {gate.padded[1]} is not a multiple of {ROWS_OF_DOWN}"
    return None


def moe(
    x: Float[Array, "P D"],
    weights: Float[Array, "P X"],
    chosen: Int[Array, "P X"],
    gate: MXFP4Words,
    up: MXFP4Words,
    down: MXFP4Words,
    *,
    config: Any = None,
    interpret: Any = False,
) -> Float[Array, "P D"]:
    """`reference.moe`.

    Args:
      config: a `mosaic_gpu_few.Config`, or two `mosaic_gpu_many.Config` for more than 64 tokens; by
        default what was fastest.
      interpret: True, or `InterpretGPUParams`, to simulate on a CPU.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x, chosen, gate):
        raise NotImplementedError(reason)
    if interpret is True:
        interpret = plgpu.InterpretGPUParams()
    form = mosaic_gpu_few if len(chosen) <= FEW_TOKENS else mosaic_gpu_many
    return form.moe(x, weights, chosen, gate, up, down, config=config, interpret=interpret)
