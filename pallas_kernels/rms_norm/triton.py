"""Root-mean-square norm of a few rows in one kernel, in Triton; XLA takes two."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.triton import ANYWHERE

MAX_ROWS = 256  # more fill the device, however they are cut
MAX_COLUMNS = 16384  # that a program has in registers


def unsupported(x: Any) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    if x.dtype != jnp.bfloat16:
        return f"activations are {x.dtype} and not bfloat16"
    rows = math.prod(x.shape[:-1])
    if rows > MAX_ROWS or x.shape[-1] > MAX_COLUMNS:
        return f"{rows} rows of {x.shape[-1]} are more than {MAX_ROWS} of {MAX_COLUMNS}"
    return None


def rms_norm(
    x: Float[Array, "*b D"], weight: Float[Array, " D"], *, eps: float, interpret: bool = False
) -> Float[Array, "*b D"]:
    """`reference.rms_norm`.

    Raises:
      NotImplementedError: with the reason, if it can't.
    """
    if reason := unsupported(x):
        raise NotImplementedError(reason)
    flat = x.reshape(-1, x.shape[-1])
    y = pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        out_shape=jax.ShapeDtypeStruct(flat.shape, x.dtype),
        grid=(len(flat),),
        in_specs=[ANYWHERE] * 2,
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(flat, weight)
    return y.reshape(x.shape)


def _kernel(x_ref: Any, weight_ref: Any, y_ref: Any, *, eps: float) -> None:
    row, dim = pl.program_id(0), x_ref.shape[1]
    column = jnp.arange(pl.next_power_of_2(dim))
    there = column < dim
    x = plt.load(x_ref.at[row, column], mask=there, other=0.0).astype(jnp.float32)
    weight = plt.load(weight_ref.at[column], mask=there, other=0.0).astype(y_ref.dtype)
    scale = jax.lax.rsqrt(jnp.sum(x * x) / dim + eps)
    y = (x * scale).astype(y_ref.dtype) * weight
    plt.store(y_ref.at[row, column], y, mask=there)
