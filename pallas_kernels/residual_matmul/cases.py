"""Named cases of products added to a residual stream."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of x [tokens, f] and W [d, f].

    Attributes:
      tokens, d, f: T, D and F.
      scale: of the residual, in standard deviations of the product.
    """

    tokens: int
    d: int
    f: int
    scale: float = 1.0


# The attention's output projection.
REAL = {
    "flash 1": Case(1, 4096, 8192),
    "flash 8": Case(8, 4096, 8192),
    "pro 1": Case(1, 6144, 16384),
    "pro 8": Case(8, 6144, 16384),
    "pro/4 1": Case(1, 6144, 4096),
}

# Small enough to be interpreted.
SMALL = {
    "narrow": Case(1, 64, 128),
    "off the tiles": Case(1, 70, 384),
    "fewer rows than a tile": Case(1, 5, 128),
    "wide": Case(1, 96, 1024),
    "two rows": Case(2, 64, 384),
    "three rows, off the tiles": Case(3, 39, 1024),
    "eight rows": Case(8, 64, 1024),
    "a large residual": Case(1, 64, 1024, 1000.0),
    "a large residual, five rows": Case(5, 40, 384, 1000.0),
}


def shapes(case: Case) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Of the arguments of the operation: x, W and residual."""
    of = ((case.tokens, case.f), (case.d, case.f), (case.tokens, case.d))
    return tuple(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in of)


def arrays(case: Case, seed: int) -> tuple[Array, ...]:
    """Random arguments, bfloat16, whose product's standard deviation is one."""
    rng = np.random.default_rng(seed)
    scales = (1.0, 1 / math.sqrt(case.f), case.scale)
    return tuple(
        jnp.asarray(scale * rng.standard_normal(a.shape, np.float32), a.dtype)
        for a, scale in zip(shapes(case), scales, strict=True)
    )
