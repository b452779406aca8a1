"""A product of a few rows with dense bfloat16 weights, added to a residual stream, in Triton.

One kernel, which reads each weight once; XLA takes two, because it splits the sums among programs.
The columns of its matrix instructions are tokens and ranges of the sum.  A tile's rows are as many
groups as there are ranges: a group reads its range of the same rows of W, wants its own columns of
the product, and the rest is left.  Then the groups are added up, in the program and in the same
order every time.  So a program has fewer rows of W than a matrix instruction, and there are enough
programs to keep the memory busy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.triton import ANYWHERE, COLUMNS, LEAST_HEIGHT, groups

MAX_ROWS = 8  # of x
MULTIPLE = 128  # of F: COLUMNS ranges of 16, which a matrix instruction sums


@dataclasses.dataclass(frozen=True)
class Config:
    """How the product is cut; sizes are powers of two.

    Attributes:
      rows: rows of W of a program.
      parts: ranges of F that are the groups of a tile: up to COLUMNS, and a tile's rows * parts are
        at least 16.
      block: columns at a time, of each range; fewer where they don't divide it.
      stages: blocks that are on their way or in use at a time, about.
      warps: for Triton.
    """

    rows: int = 8
    parts: int = 4
    block: int = 128
    stages: int = 4
    warps: int = 2


def configure(tokens: int) -> Config:
    """What was fastest on an H100 (benchmarks/LOG.md)."""
    # Every program reads all of x: with as many rows of W as of x, as many bytes as W has.
    return Config() if tokens == 1 else Config(rows=16, stages=3, warps=4)


def unsupported(x: Any, w: Any) -> str | None:
    """Why this kernel can't do a case; None if it can."""
    for name, array in (("activations", x), ("weights", w)):
        if array.dtype != jnp.bfloat16:
            return f"{name} are {array.dtype} and not bfloat16"
    if not 1 <= len(x) <= MAX_ROWS:
        return f"{len(x)} rows are not 1 to {MAX_ROWS}"
    if w.shape[1] % MULTIPLE:
        return f"{w.shape[1]} columns are not a multiple of {MULTIPLE}"
    return None


def residual_matmul(
    x: Float[Array, "T F"],
    w: Float[Array, "D F"],
    residual: Float[Array, "T D"] | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "T D"]:
    """`reference.residual_matmul` of up to `MAX_ROWS` rows.

    Raises:
      NotImplementedError: with the reason, if it can't.
      ValueError: the config's tiles are lower than a matrix instruction, or have too many parts.
    """
    if reason := unsupported(x, w):
        raise NotImplementedError(reason)
    config = config or configure(len(x))
    if config.rows * config.parts < LEAST_HEIGHT or config.parts > COLUMNS:
        raise ValueError(
            f"a tile has {config.parts} parts of {config.rows} rows: choose {COLUMNS} parts at "
            f"most, with {LEAST_HEIGHT} rows together at least"
        )
    block = math.gcd(config.block, w.shape[1] // config.parts)
    optional = [] if residual is None else [residual]
    dtype = jnp.float32 if residual is None else residual.dtype
    return pl.pallas_call(
        functools.partial(_kernel, config=dataclasses.replace(config, block=block)),
        out_shape=jax.ShapeDtypeStruct((len(x), len(w)), dtype),
        grid=(pl.cdiv(len(w), config.rows),),
        in_specs=[ANYWHERE] * (2 + len(optional)),
        out_specs=ANYWHERE,
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="residual_matmul",
    )(x, w, *optional)


def _kernel(x_ref: Any, w_ref: Any, *refs: Any, config: Config) -> None:
    *optional, out_ref = refs
    tokens, d = out_ref.shape
    token = jnp.arange(max(pl.next_power_of_2(tokens), COLUMNS // config.parts))
    row = pl.program_id(0) * config.rows + jnp.arange(config.rows)
    place = token[None, :], row[:, None]
    there = (token < tokens)[None, :] & (row < d)[:, None]
    # Before the product, during which it arrives.
    residual = [plt.load(ref.at[place], mask=there, other=0.0) for ref in optional]
    y = _product(x_ref, w_ref, len(token), config)
    for r in residual:
        y = y + r.astype(jnp.float32)
    plt.store(out_ref.at[place], y.astype(out_ref.dtype), mask=there)


def _product(x_ref: Any, w_ref: Any, slots: int, config: Config) -> Float[Array, "M N"]:
    """The program's rows of W times N = slots tokens; those that aren't there repeat the last."""
    (d, f), rows, parts = w_ref.shape, config.rows, config.parts
    part, row = groups(pl.program_id(0), rows * parts, rows)
    row = jnp.minimum(row, d - 1)[:, None]
    column = jnp.arange(slots * parts)  # a token's ranges are next to each other
    token, part_of_column = jnp.minimum(column // parts, len(x_ref) - 1), column % parts
    span = f // parts

    def body(step: Any, total: Array) -> Array:
        k = step * config.block + jnp.arange(config.block)
        weights = plt.load(w_ref.at[row, part[:, None] * span + k[None, :]])
        x = plt.load(x_ref.at[token[None, :], part_of_column[None, :] * span + k[:, None]])
        return total + plt.dot(weights, x)

    zeros = jnp.zeros((rows * parts, len(column)), jnp.float32)
    y = jax.lax.fori_loop(0, span // config.block, body, zeros)
    own = jnp.where(part[:, None] == part_of_column[None, :], y, 0.0)
    of_groups = own.reshape(rows * parts, slots, parts).sum(axis=2)
    return of_groups.reshape(parts, rows, slots).sum(axis=0)
